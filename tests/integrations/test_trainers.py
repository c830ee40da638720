"""The optimizers inside other people's training loops: save, resume, compile, distribute."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

from steepest import Muon, SignSGD, Signum, SpectralDescent

every_optimizer = pytest.mark.parametrize("optimizer", [SignSGD, Signum, SpectralDescent, Muon])


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """No network, no advertisements, and no warnings about the number of workers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def small_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def equal(first, second):
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


# Hugging Face


def gpt2():
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def hugging_face_trainer(model, optimizer, folder, steps, **settings):
    import transformers

    tokens = torch.randint(32, (12, 8), generator=torch.Generator().manual_seed(1))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=0.5,
        save_steps=2, report_to=[], disable_tqdm=True, logging_strategy="no", use_cpu=True,
        seed=4, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@every_optimizer
def test_hugging_faces_trainer_resumes_bit_for_bit(optimizer, tmp_path):
    def make(model):
        return optimizer(model, lr=0.02, adamw_lr=0.01, weight_decay=0.1)

    straight, first, second = gpt2(), gpt2(), gpt2()
    trainer = hugging_face_trainer(straight, make(straight), tmp_path / "straight", 4)
    trainer.train()
    assert not equal(straight, gpt2())
    # its linear schedule reached every group, each from its own rate
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert rates == [0.02, 0.01]
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.0, 0.0]

    hugging_face_trainer(first, make(first), tmp_path / "resumed", 4).train()
    checkpoint = tmp_path / "resumed" / "checkpoint-2"
    resumed = hugging_face_trainer(second, make(second), tmp_path / "resumed", 4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    assert equal(first, straight)
    assert equal(second, straight)


def test_hugging_faces_trainer_sees_the_blocks_of_a_fused_projection(tmp_path):
    model = gpt2()
    trainer = hugging_face_trainer(model, Muon(model), tmp_path, 1)
    trainer.train()
    group = trainer.optimizer.param_groups[0]
    views = dict(zip(group["param_names"], group["views"], strict=True))
    assert views["transformer.h.0.attn.c_attn.weight"] == (1, 16, 48, True, (16, 16, 16))


@every_optimizer
def test_accelerate_prepares_an_optimizer_that_has_not_stepped(optimizer):
    accelerate = pytest.importorskip("accelerate")
    plain, prepared = small_model(), small_model()
    reference = optimizer(plain, lr=0.02)
    accelerator = accelerate.Accelerator(cpu=True)
    model, tested = accelerator.prepare(prepared, optimizer(prepared, lr=0.02))
    groups = tested.param_groups
    assert [group["geometry"] for group in groups] == [
        g["geometry"] for g in reference.param_groups
    ]
    for step in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for net, each, backward in (
            (plain, reference, torch.Tensor.backward),
            (model, tested, accelerator.backward),
        ):
            each.zero_grad()
            backward(net(x).square().sum())
            each.step()
    assert equal(plain, prepared)
    accelerator.free_memory()


# Lightning


def lightning_run(optimizer, folder, steps, resume=None):
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = small_model()

        def training_step(self, batch, index):
            generator = torch.Generator().manual_seed(self.global_step)
            return self.model(batch + torch.randn(2, 4, generator=generator)).square().sum()

        def configure_optimizers(self):
            tested = optimizer(self.model, lr=0.02, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(tested, lambda step: 1 / (1 + step))
            return [tested], [{"scheduler": schedule, "interval": "step"}]

    task = Task()
    data = torch.zeros(8, 4)  # what a step sees is drawn from its number
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        gradient_clip_val=1.0, barebones=False,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=resume)
    return task, trainer


@every_optimizer
def test_lightning_optimizes_automatically_and_resumes_bit_for_bit(optimizer, tmp_path):
    straight, trainer = lightning_run(optimizer, tmp_path, 6)
    # after six steps the schedule is at a seventh of each group's rate
    for group in trainer.optimizers[0].param_groups:
        assert group["lr"] == pytest.approx(group["initial_lr"] / 7)
    _, half = lightning_run(optimizer, tmp_path, 4)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = lightning_run(optimizer, tmp_path, 6, resume=tmp_path / "half.ckpt")
    assert trainer.global_step == 6
    assert not equal(straight, small_model())
    assert equal(straight, resumed)


# torch.compile and data parallelism


@every_optimizer
def test_a_compiled_model_takes_the_same_steps(optimizer):
    plain, other = small_model(), small_model()
    compiled = torch.compile(other, backend="aot_eager")
    reference, tested = optimizer(plain, lr=0.02), optimizer(compiled, lr=0.02)
    names = [[group["param_names"] for group in each.param_groups] for each in (reference, tested)]
    assert names[0] == names[1]
    for step in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for net, each in ((plain, reference), (compiled, tested)):
            each.zero_grad()
            net(x).square().sum().backward()
            each.step()
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
    torch._dynamo.reset()


WORKER = """
    from torch import nn
    import steepest

    results = {}
    for name in ("SignSGD", "Signum", "SpectralDescent", "Muon"):
        torch.manual_seed(3)
        layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)]
        model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers))
        optimizer = getattr(steepest, name)(model, lr=0.02, weight_decay=0.1)
        for step in range(5):
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x[3 * rank : 3 * rank + 3]).square().mean().backward()
            optimizer.step()
        results[name] = [p.detach() for p in model.parameters()]
    torch.save(results, f"{folder}/{rank}.pt")
"""


@pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)
def test_two_processes_take_the_steps_of_one_with_both_batches(tmp_path, run_in_two):
    run_in_two(WORKER, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for optimizer in (SignSGD, Signum, SpectralDescent, Muon):
        model = small_model()
        tested = optimizer(model, lr=0.02, weight_decay=0.1)
        for step in range(5):
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            tested.zero_grad()
            for half in (x[:3], x[3:]):  # halves of a sum round as the average of two does
                (model(half).square().mean() / 2).backward()
            tested.step()
        name = optimizer.__name__
        for p, q, r in zip(model.parameters(), first[name], second[name], strict=True):
            assert torch.equal(q, r)
            assert torch.equal(p, q)


@every_optimizer
def test_sharded_parameters_are_refused_and_not_updated_wrongly(optimizer):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = fully_shard(small_model(), mesh=init_device_mesh("cpu", (1,)))
        tested = optimizer(model, lr=0.02)
        model(torch.ones(2, 4)).sum().backward()
        with pytest.raises(NotImplementedError, match=r"0\.weight.*Distributed"):
            tested.step()
        start = small_model().parameters()
        for p, q in zip(model.parameters(), start, strict=True):
            assert torch.equal(p.full_tensor(), q)
    finally:
        torch.distributed.destroy_process_group()
