"""What people do to an optimizer, a model or a step in the middle of training."""

from __future__ import annotations

import copy
import io
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.checkpoint import checkpoint

import steepest
from steepest import Muon

NAMES = ["SignSGD", "Signum", "SpectralDescent", "Muon", "TEON", "Shampoo", "KLShampoo", "SOAP"]
OPTIMIZERS = [getattr(steepest, name) for name in NAMES if hasattr(steepest, name)]
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)

pytestmark = pytest.mark.filterwarnings("ignore:TEON found nothing to stack")


def network(dtype=torch.float32):
    torch.manual_seed(5)
    layers = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8), nn.Linear(8, 8)
    )
    return layers.to(dtype)


MATRICES = {"0.weight", "2.weight", "4.weight"}


def batch(step, size=32):
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, torch.cat([x[:, :3] * x[:, 3:], x.roll(1, 1)[:, 1:].sin()], 1)


def loss_of(model, step, size=32):
    dtype = next(model.parameters()).dtype
    x, y = (each.to(dtype) for each in batch(step, size))
    return nn.functional.mse_loss(model(x), y)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def state_of(model, optimizer):
    tensors = [t for p in model.parameters() for t in optimizer.state.get(p, {}).values()]
    return [t.detach().clone() for t in [*model.parameters(), *tensors]]


def equal(first, second):
    assert len(first) == len(second) > 0
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Schedules


SCHEDULES = {
    "warm-up, then cosine": lambda optimizer: schedulers.SequentialLR(
        optimizer,
        [
            schedulers.LinearLR(optimizer, 0.1, 1.0, 4),
            schedulers.CosineAnnealingLR(optimizer, 8),
        ],
        milestones=[4],
    ),
    "chained": lambda optimizer: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(optimizer, 0.9), schedulers.StepLR(optimizer, 5, 0.5)]
    ),
    "plateau": lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=1),
    "one cycle": lambda optimizer: schedulers.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=13,
        cycle_momentum="momentum" in optimizer.defaults,
    ),
    "cyclic": lambda optimizer: schedulers.CyclicLR(
        optimizer,
        base_lr=[0.1 * group["lr"] for group in optimizer.param_groups],
        max_lr=[group["lr"] for group in optimizer.param_groups],
        step_size_up=4,
        cycle_momentum=False,
    ),
    "restarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 5),
}


@every_optimizer
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_schedule_keeps_the_ratio_of_the_two_rates(optimizer, make):
    model = network()
    tested = optimizer(model, lr=0.02, adamw_lr=0.005)
    schedule = make(tested)
    seen = set()
    for step in range(12):
        rates = [group["lr"] for group in tested.param_groups]
        assert rates[0] == pytest.approx(4 * rates[1], rel=1e-9, abs=1e-12)
        seen.add(round(rates[0], 9))
        train(model, tested, [step])
        schedule.step(1.0) if make is SCHEDULES["plateau"] else schedule.step()
    assert len(seen) >= 4
    assert all(p.isfinite().all() for p in model.parameters())


def test_one_cycle_turns_the_momentum_of_the_matrices_too():
    W, by_hand = (nn.Parameter(torch.eye(3, dtype=torch.float64)) for _ in range(2))
    tested, plain = (Muon([p], lr=0.1) for p in (W, by_hand))
    schedule = schedulers.OneCycleLR(tested, 0.1, total_steps=8)
    cycle = schedulers.OneCycleLR(torch.optim.SGD([torch.zeros(1)], momentum=0.9), 0.1, 8)
    momenta = set()
    for step in range(7):
        expected = cycle.optimizer.param_groups[0]
        plain.param_groups[0].update(lr=expected["lr"], momentum=expected["momentum"])
        momenta.add(expected["momentum"])
        G = torch.randn(3, 3, generator=torch.Generator().manual_seed(step)).double()
        for p, each in ((W, tested), (by_hand, plain)):
            p.grad = G.clone()
            each.step()
        schedule.step()
        cycle.optimizer.step()
        cycle.step()
    assert len(momenta) > 3
    assert torch.equal(W, by_hand)


def test_a_rate_for_each_group_can_be_scheduled_on_its_own():
    tested = Muon(network(), lr=0.02, adamw_lr=0.005)
    schedule = schedulers.LambdaLR(tested, [lambda step: 1.0, lambda step: 1 / (1 + step)])
    tested.step()
    schedule.step()
    assert [group["lr"] for group in tested.param_groups] == [0.02, 0.0025]


# Mixed precision


@every_optimizer
def test_an_overflow_under_a_scaler_leaves_everything_as_it_was(optimizer):
    model, clean = network(), network()
    tested, reference = optimizer(model, lr=0.02), optimizer(clean, lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    schedule = schedulers.StepLR(tested, 100)
    for step in range(5):
        tested.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step in (0, 3):
            model[4].weight.grad[1, 2] = torch.inf if step else torch.nan
            before, keys = state_of(model, tested), len(tested.state)
        else:
            train(clean, reference, [step])
        scaler.unscale_(tested)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(tested)
        scaler.update()
        schedule.step()
        if step in (0, 3):
            assert equal(state_of(model, tested), before)
            assert len(tested.state) == keys
    assert scaler.get_scale() == 2.0**10
    assert tested.skipped_steps == 0  # the scaler left them out, not the optimizer
    assert equal(state_of(model, tested), state_of(clean, reference))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_weights_and_memory_stay_in_float32_and_learn(dtype, observer):
    model = network()
    tested = Muon(model, lr=0.02)
    first = loss_of(model, 0).item()
    for step in range(60):
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, step, size=64)
        tested.zero_grad()
        loss.backward()
        tested.step()
    assert loss_of(model, 0).item() < 0.6 * first
    assert all(t.dtype == torch.float32 for t in state_of(model, tested))
    observer.assert_spectral(MATRICES, 60)


# Gradients that come in parts, or twice


# not SOAP: the eigenvectors of a first gradient of low rank are arbitrary where it is zero
@pytest.mark.parametrize("optimizer", [each for each in OPTIMIZERS if each.__name__ != "SOAP"])
def test_accumulated_gradients_take_the_step_of_the_whole_batch(optimizer):
    whole, parts = network(torch.float64), network(torch.float64)
    reference, tested = optimizer(whole, lr=0.02), optimizer(parts, lr=0.02)
    for step in range(4):
        train(whole, reference, [step])
        tested.zero_grad()
        x, y = batch(step)
        for i in range(0, 32, 8):
            (nn.functional.mse_loss(parts(x[i : i + 8]), y[i : i + 8]) / 4).backward()
        tested.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


class Checkpointed(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@every_optimizer
def test_gradient_checkpointing_changes_nothing(optimizer):
    plain, saving = network(), Checkpointed(*network())
    reference, tested = optimizer(plain, lr=0.02), optimizer(saving, lr=0.02)
    train(plain, reference, range(3))
    train(saving, tested, range(3))
    assert equal(state_of(plain, reference), state_of(saving, tested))


# Layers that come, go, and are shared


@every_optimizer
def test_a_layer_can_be_frozen_and_set_free_again(optimizer):
    model = network()
    model[0].requires_grad_(False)
    tested = optimizer(model, lr=0.02, weight_decay=0.1, adamw_weight_decay=0.1)

    def moved(steps):
        before = copy.deepcopy(model)
        memory = {name: copy.deepcopy(tested.state.get(p)) for name, p in model.named_parameters()}
        train(model, tested, steps)
        pairs = zip(model.named_parameters(), before.parameters(), strict=True)
        changed = {name.split(".")[0] for (name, p), q in pairs if not torch.equal(p, q)}
        for name, p in model.named_parameters():
            if name.split(".")[0] not in changed and memory[name]:
                for key, value in memory[name].items():
                    assert torch.equal(tested.state[p][key], value)
        return changed

    assert moved(range(2)) == {"2", "4", "5"}
    assert model[0].weight not in tested.state
    model[0].requires_grad_(True)
    model[4].requires_grad_(False)
    assert moved(range(2, 4)) == {"0", "2", "5"}
    model[4].requires_grad_(True)
    assert moved(range(4, 6)) == {"0", "2", "4", "5"}


def test_a_layer_set_free_gets_the_spectral_update(observer):
    model = network()
    model[0].requires_grad_(False)
    tested = Muon(model, lr=0.02)
    train(model, tested, range(2))
    observer.assert_spectral(MATRICES - {"0.weight"}, 2)
    observer.steps.clear()
    model[0].requires_grad_(True)
    train(model, tested, range(2))
    observer.assert_spectral(MATRICES, 2)


def grow(model, optimizer):
    """The model with one more layer inside, which the optimizer trains too."""
    added = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    optimizer.add_param_group({"params": [("added.weight", added[0].weight)]})
    optimizer.add_param_group({"params": [("added.bias", added[0].bias)], "geometry": "adamw"})
    return nn.Sequential(*model[:4], *added, *model[4:])


def test_layers_added_later_are_trained_and_resumed(observer):
    model, other = network(), network()
    tested, resumed = Muon(model, lr=0.02), Muon(other, lr=0.5)
    train(model, tested, range(2))
    grown = grow(model, tested)
    assert [group["lr"] for group in tested.param_groups] == [0.02, 0.003, 0.02, 0.003]
    observer.steps.clear()
    train(grown, tested, range(2, 5))
    observer.assert_spectral(MATRICES | {"added.weight"}, 3)

    continued = grow(other, resumed)
    continued.load_state_dict(grown.state_dict())
    resumed.load_state_dict(copy.deepcopy(tested.state_dict()))
    train(grown, tested, range(5, 8))
    train(continued, resumed, range(5, 8))
    assert equal(state_of(grown, tested), state_of(continued, resumed))


@every_optimizer
def test_weights_stay_tied_through_training_and_a_checkpoint(optimizer):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(7, 8)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight
            self.lm_head = nn.Linear(8, 7, bias=False)
            self.lm_head.weight = self.embedding.weight

        def forward(self, ids):
            return self.lm_head(self.second(self.first(self.embedding(ids)).tanh()))

    def go(model, optimizer, steps):
        for step in steps:
            ids = torch.randint(7, (12,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(ids), ids.roll(1)).backward()
            optimizer.step()

    model, other = Tied(), Tied()
    tested, resumed = optimizer(model, lr=0.02), optimizer(other, lr=0.5)
    names = [name for group in tested.param_groups for name in group["param_names"]]
    assert sorted(names) == ["embedding.weight", "first.bias", "first.weight", "second.bias"]
    assert tested.param_groups[1]["param_names"][0] == "embedding.weight"
    go(model, tested, range(3))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(tested.state_dict()))
    go(model, tested, range(3, 6))
    go(other, resumed, range(3, 6))
    assert model.second.weight is model.first.weight
    assert equal(state_of(model, tested), state_of(other, resumed))


class LoRA(nn.Module):
    """Low-Rank Adaptation, as in its paper: the sum of a frozen layer and B A."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


@every_optimizer
def test_adapters_are_trained_and_the_frozen_model_is_not(optimizer):
    model = network()
    for i in (0, 2, 4):
        model[i] = LoRA(model[i])
    model[5].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    tested = optimizer(model, lr=0.02, weight_decay=0.1)
    train(model, tested, range(3))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{i}.lora_{x}" for i in (0, 2, 4) for x in "AB"}
    memory = {id(p) for p in tested.state}
    assert memory <= {id(p) for p in model.parameters() if p.requires_grad}


def test_adapters_get_the_spectral_update_once_they_have_a_gradient(observer):
    model = network()
    for i in (0, 2, 4):
        model[i] = LoRA(model[i])
    tested = Muon(model, lr=0.02)
    A = model[0].lora_A.detach().clone()
    train(model, tested, range(1))
    assert torch.equal(model[0].lora_A, A)  # B is zero, and so is the gradient of A
    observer.steps.clear()
    train(model, tested, range(1, 4))
    observer.assert_spectral({f"{i}.lora_{x}" for i in (0, 2, 4) for x in "AB"}, 3)


def test_adapters_of_peft_get_the_spectral_update(observer):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = copy.deepcopy(model.state_dict())
    tested = Muon(model, lr=0.02)
    ids = torch.randint(32, (8, 12))
    for step in range(4):
        tested.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        tested.step()
        if step == 0:
            observer.steps.clear()  # no gradient for A yet
    observer.assert_spectral(trained, 3)
    assert len(trained) == 14
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained)


# Models that have no memory yet


@every_optimizer
def test_a_model_made_on_meta_is_trained_once_it_has_memory(optimizer):
    with torch.device("meta"):
        model = network()
    table = [(row.name, row.role, row.view) for row in steepest.roles(model)]
    model.to_empty(device="cpu")
    model.load_state_dict(network().state_dict())
    assert [(row.name, row.role, row.view) for row in steepest.roles(model)] == table
    plain = network()
    tested, reference = optimizer(model, lr=0.02), optimizer(plain, lr=0.02)
    train(model, tested, range(2))
    train(plain, reference, range(2))
    assert equal(state_of(model, tested), state_of(plain, reference))


def test_an_optimizer_made_on_meta_goes_on_where_parameters_are_swapped():
    # torch's own way to materialize without making other parameters
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.device("meta"):
            model = network()
        with pytest.warns(UserWarning, match="on the meta device"):
            tested = Muon(model, lr=0.02)
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model.load_state_dict(network().state_dict())
    plain = network()
    reference = Muon(plain, lr=0.02)
    train(model, tested, range(2))
    train(plain, reference, range(2))
    assert equal(list(model.parameters()), list(plain.parameters()))


def test_a_model_of_hugging_face_loaded_with_little_memory(observer, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, low_cpu_mem_usage=True)
    tested = Muon(model, lr=0.02)
    assert not any(p.is_meta for group in tested.param_groups for p in group["params"])
    ids = torch.randint(32, (8, 12))
    for _ in range(2):
        tested.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        tested.step()
    proj = [f"self_attn.{x}" for x in "qkvo"] + [f"mlp.{x}" for x in ("gate", "up", "down")]
    observer.assert_spectral({f"model.layers.0.{name}_proj.weight" for name in proj}, 2)


# torch.compile


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


COMPILED = [(each, rate, "eager") for each in OPTIMIZERS for rate in ("float", "tensor")]
COMPILED += [(each, rate, "aot_eager") for each in OPTIMIZERS for rate in ("float", "tensor")]
COMPILED += [(each, "float", "inductor") for each in OPTIMIZERS]


@pytest.mark.parametrize(
    ("optimizer", "rate", "backend"),
    COMPILED,
    ids=[f"{each.__name__}-{rate}-{backend}" for each, rate, backend in COMPILED],
)
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_step_follows_the_schedule_without_compiling_again(optimizer, rate, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler here")
    plain, compiled = (
        [nn.Parameter(p.detach().clone()) for p in network().parameters()] for _ in range(2)
    )

    def make(params):
        matrices = {"params": [p for p in params if p.ndim == 2]}
        vectors = {"params": [p for p in params if p.ndim == 1], "geometry": "adamw"}
        if rate == "tensor":
            for group in (matrices, vectors):
                group["lr"] = torch.tensor(0.02)
        return optimizer([matrices, vectors], lr=0.02, weight_decay=0.1)

    reference, tested = make(plain), make(compiled)
    schedules = [schedulers.CosineAnnealingLR(each, 12) for each in (reference, tested)]
    step = torch.compile(tested.step, backend=backend)
    graphs = []
    for i in range(8):
        generator = torch.Generator().manual_seed(i)
        for p, q in zip(plain, compiled, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        reference.step()
        step()
        for schedule in schedules:
            schedule.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    for p, q in zip(plain, compiled, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
    assert graphs[-1] == graphs[2], f"compiled again and again: {graphs}"


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_is_seen_with_its_own_names_and_trained(observer):
    model = network()
    tested = Muon(torch.compile(model, backend="aot_eager"), lr=0.02)
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, tested, range(3))
    observer.assert_spectral(MATRICES, 3)


# Saving


def test_a_whole_training_state_goes_through_one_file_of_plain_tensors():
    model, other = network(), network()
    parts = []
    for each in (model, other):
        optimizer = Muon(each, lr=0.02)
        schedule = schedulers.SequentialLR(
            optimizer,
            [
                schedulers.LinearLR(optimizer, 0.1, total_iters=2),
                schedulers.CosineAnnealingLR(optimizer, 6),
            ],
            milestones=[2],
        )
        parts.append([each, optimizer, schedule, torch.amp.GradScaler("cpu")])
    for step in range(4):
        train(model, parts[0][1], [step])
        parts[0][2].step()
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts[0]], file)
    file.seek(0)
    for part, state in zip(parts[1], torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for each, optimizer, schedule, _ in parts:
        for step in range(4, 7):
            train(each, optimizer, [step])
            schedule.step()
    assert equal(state_of(model, parts[0][1]), state_of(other, parts[1][1]))


# Hugging Face's Trainer


def trainer_of(model, folder, optimizer=None, **settings):
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(32, (16, 12), generator=torch.Generator().manual_seed(1))
    steps = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no"}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            **{**steps, **quiet, **{k: v for k, v in settings.items() if "optim" not in k}},
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        **{k: v for k, v in settings.items() if "optim" in k},
    )


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_offline")
def test_the_trainer_with_accumulation_checkpointing_and_bfloat16(observer, tmp_path):
    model = llama()
    tested = Muon(model, lr=0.02)
    trainer_of(
        model, tmp_path, optimizers=(tested, None), bf16=True, gradient_checkpointing=True,
        gradient_accumulation_steps=2, lr_scheduler_type="constant",
    ).train()  # fmt: skip
    names = {row.name for row in steepest.roles(model).matrices}
    assert len(names) == 7
    observer.assert_spectral(names, 3)


@pytest.mark.usefixtures("_offline")
def test_the_trainers_factory_takes_the_steps_of_the_instance(tmp_path):
    first, second = llama(), llama()
    trainer_of(first, tmp_path, optimizers=(Muon(first, lr=0.03), None)).train()
    made = (lambda: Muon, {"lr": 0.03})
    trainer_of(second, tmp_path, optimizer_cls_and_kwargs=made).train()
    assert equal(list(first.parameters()), list(second.parameters()))


@pytest.mark.usefixtures("_offline")
def test_the_trainer_with_the_class_for_a_factory_is_told_to_pass_the_model(tmp_path):
    trainer = trainer_of(llama(), tmp_path, optimizer_cls_and_kwargs=(Muon, {"lr": 0.03}))
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs"):
        trainer.train()


# accelerate


@every_optimizer
def test_accelerate_saves_and_resumes_bit_for_bit(optimizer, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    results = []
    for resumes in (False, True):
        model = network()
        tested = optimizer(model, lr=0.02, weight_decay=0.1)
        schedule = schedulers.CosineAnnealingLR(tested, 10)
        model, tested, schedule = accelerator.prepare(model, tested, schedule)
        for step in range(6):
            if step == 3:
                accelerator.save_state(str(tmp_path / str(resumes)))
                if resumes:
                    train(model, tested, range(100, 102))  # to be forgotten
                    accelerator.load_state(str(tmp_path / str(resumes)))
            train(model, tested, [step])
            schedule.step()
        results.append(state_of(model, tested.optimizer))
        accelerator.free_memory()
    assert equal(*results)
