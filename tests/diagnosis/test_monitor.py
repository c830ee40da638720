"""The monitor: measures what it says, changes nothing, goes on, and lets go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import steepest
from steepest import Monitor
from steepest.diagnosis import hf_callback, lightning_callback
from steepest.files import read_lines
from steepest.linalg import nuclear_rank, stable_rank


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 4))


def _batch(step: int, part: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + part)
    return torch.randn(20, 6, generator=generator), torch.arange(20) % 4


def _train(model: nn.Module, optimizer: Any, steps: range, parts: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        for part in range(parts):
            x, y = _batch(step, part)
            (F.cross_entropy(model(x), y) / parts).backward()
        optimizer.step()


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("build", [steepest.Muon, steepest.SOAP, torch.optim.AdamW])
def test_training_is_the_same_bit_for_bit(build: Any) -> None:
    weights = []
    for watched in (False, True):
        model = _model()
        optimizer = build(model if build is not torch.optim.AdamW else model.parameters(), lr=0.01)
        torch.manual_seed(5)  # of dropout
        if watched:
            with Monitor(model, optimizer, every=2) as monitor:
                _train(model, optimizer, range(5))
            assert {record["step"] for record in monitor.records} == {1, 3, 5}
        else:
            _train(model, optimizer, range(5))
        weights.append([p.detach().clone() for p in model.parameters()])
        assert _hooks(model) == 0
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_records_are_what_they_say() -> None:
    model = _model().eval()  # without dropout, to compute it again
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Monitor(model, optimizer, every=2) as monitor:
        _train(model, optimizer, range(2))
        before = model[3].weight.detach().clone()
        memory = optimizer.state[model[3].weight]["momentum_buffer"].clone()
        x, y = _batch(2)
        A = model[1](model[0](x))
        G = torch.autograd.grad(F.cross_entropy(model(x), y), model[3].weight)[0]
        _train(model, optimizer, range(2, 3))
        moved = model[3].weight - before
    record = next(r for r in monitor.records if r["step"] == 3 and r["matrix"] == "3.weight")
    assert record["kind"] == "condition"
    assert record["role"] == "head"
    assert record["tokens"] == 20
    for key, value in (
        ("nuclear_rank", nuclear_rank(G)),
        ("gradient_stable_rank", stable_rank(G)),
        ("momentum_nuclear_rank", nuclear_rank(memory)),
        ("stable_rank", stable_rank(A.detach())),
        ("stable_rank_output", stable_rank(model[3](A).detach())),
        ("weight_rms", model[3].weight.detach().square().mean().sqrt()),
        ("update_rms", moved.detach().square().mean().sqrt()),
    ):
        if key == "stable_rank_output":
            continue  # of the weights before the step
        assert record[key] == pytest.approx(float(value), rel=0.03), key


def test_gradients_may_be_accumulated_scaled_and_clipped() -> None:
    def records(scale: float, clip: float | None) -> list[dict[str, Any]]:
        model = _model().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with Monitor(model, optimizer, every=1) as monitor:
            for part in range(3):
                x, y = _batch(0, part)
                (scale * F.cross_entropy(model(x), y)).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return monitor.records

    keys = ("nuclear_rank", "stable_rank", "gradient_stable_rank", "tokens")
    plain, changed = records(1.0, None), records(1024.0, 1e-3)
    for a, b in zip(plain, changed, strict=True):
        for key in keys:
            assert a[key] == pytest.approx(b[key], rel=1e-3)


class _Checkpointed(nn.Module):
    """The first layers computed again in the backward pass."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.inner, self.again = _model().eval(), again

    def forward(self, x: Tensor) -> Tensor:
        if not self.again:
            return self.inner(x)
        return self.inner[3](checkpoint(self.inner[:3], x, use_reentrant=False))


def test_activations_may_be_computed_again() -> None:
    def run(again: bool, watched: bool) -> tuple[list[dict[str, Any]], list[Tensor]]:
        model = _Checkpointed(again)
        optimizer = steepest.Muon(model, lr=0.01)
        if not watched:
            _train(model, optimizer, range(3))
            return [], list(model.parameters())
        with Monitor(model, optimizer, every=1) as monitor:
            _train(model, optimizer, range(3))
        return monitor.records, list(model.parameters())

    (plain, _), (records, weights) = run(False, True), run(True, True)
    assert all(torch.equal(a, b) for a, b in zip(weights, run(True, False)[1], strict=True))
    assert len(records) == len(plain) == 6
    for mine, expected in zip(records, plain, strict=True):
        for key in ("matrix", "tokens", "nuclear_rank", "stable_rank"):
            assert mine[key] == expected[key]


def test_evaluations_in_between_are_not_looked_at() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer) as monitor:
        x, y = _batch(0)
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            model(torch.randn(333, 6))
        optimizer.step()
    assert {record["tokens"] for record in monitor.records} == {20}


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"

    def numbers(rows: list[dict[str, Any]]) -> Any:
        return json.loads(json.dumps(rows))

    model = _model()
    optimizer = steepest.Muon(model, lr=0.01)
    with Monitor(model, optimizer, every=2, path=path) as monitor:
        _train(model, optimizer, range(4))
        state = torch.save(
            [model.state_dict(), optimizer.state_dict(), monitor.state_dict()], tmp_path / "s.pt"
        )
        random = torch.get_rng_state()
        _train(model, optimizer, range(4, 8))
    expected = numbers(monitor.records)
    assert [r["step"] for r in expected] == [1, 1, 3, 3, 5, 5, 7, 7]
    model = _model()
    optimizer = steepest.Muon(model, lr=0.01)
    state = torch.load(tmp_path / "s.pt", weights_only=True)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    torch.set_rng_state(random)
    with Monitor(model, optimizer, every=2, path=path) as again:
        again.load_state_dict(state[2])
        _train(model, optimizer, range(4, 8))
    assert numbers(again.records) == expected
    assert read_lines(path) == (expected, [])


def test_an_exception_leaves_no_hook_behind() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def interrupted() -> None:
        with Monitor(model, optimizer):
            assert _hooks(model) > 0
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert _hooks(model) == 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_compiled_model_has_gradients_at_least() -> None:
    model = _model()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = _batch(0)
    F.cross_entropy(compiled(x), y).backward()
    optimizer.zero_grad()
    with Monitor(compiled, optimizer, every=1) as monitor:
        F.cross_entropy(compiled(x), y).backward()
        optimizer.step()
    assert [record["matrix"] for record in monitor.records] == ["0.weight", "3.weight"]
    assert all(record["nuclear_rank"] >= 1 for record in monitor.records)


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(_model().eval())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=2, path=Path(folder) / f"{rank}.jsonl"):
        for step in range(3):
            optimizer.zero_grad()
            x, y = _batch(step, rank)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    dist.destroy_process_group()


def test_under_ddp_the_first_process_measures_the_common_gradient(tmp_path: Path) -> None:
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    assert not (tmp_path / "1.jsonl").exists()
    rows = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 3, 3]
    model = _model().eval()
    loss = sum(F.cross_entropy(model(x), y) for x, y in (_batch(0, 0), _batch(0, 1)))
    G = torch.autograd.grad(torch.as_tensor(loss), model[0].weight)[0]
    assert rows[0]["nuclear_rank"] == pytest.approx(float(nuclear_rank(G)), rel=0.02)


def test_with_a_closure_the_gradient_is_that_of_the_step() -> None:
    model = _model().eval()
    optimizer = steepest.Muon(model, lr=0.01)

    def closure() -> float:
        optimizer.zero_grad()
        x, y = _batch(len(seen))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        seen.append(float(nuclear_rank(model[0].weight.grad)))
        return loss.item()

    seen: list[float] = []
    with Monitor(model, optimizer, every=1) as monitor:
        for _ in range(3):
            optimizer.step(closure)
    found = [r["nuclear_rank"] for r in monitor.records if r["matrix"] == "0.weight"]
    assert found == pytest.approx(seen, rel=0.02)


def test_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(32, (16, 8))]
    settings = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=5, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    callback = hf_callback(every=2)
    transformers.Trainer(model, settings, train_dataset=data, callbacks=[callback]).train()
    assert {record["step"] for record in callback.monitor.records} == {1, 3, 5}
    assert all(record["update_rms"] > 0 for record in callback.monitor.records)
    assert _hooks(model) == 0


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _model()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return steepest.Muon(self.net, lr=0.01)

    data = [_batch(step) for step in range(5)]
    callback = lightning_callback(every=2)
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=None))
    assert {record["step"] for record in callback.monitor.records} == {1, 3, 5}
    assert callback.monitor.records[0]["matrix"] == "net.0.weight"


def test_bad_input(tmp_path: Path) -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="every=0"):
        Monitor(model, optimizer, every=0)
    with pytest.raises(ValueError, match="LayerNorm without"):
        Monitor(nn.LayerNorm(3), optimizer)
    path = tmp_path / "records.jsonl"
    path.write_text('{"step": 4}\n')
    with (
        pytest.raises(FileExistsError, match="has records already"),
        Monitor(model, optimizer, path=path),
    ):
        _train(model, optimizer, range(1))
    assert path.read_text() == '{"step": 4}\n'
