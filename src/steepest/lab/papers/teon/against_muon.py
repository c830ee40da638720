"""TEON against Muon on text, each at its best rate, and the control of step size.

A stack of K square layers takes steps 1 / sqrt(K) as long as Muon's at the same rate, while outputs
and MLPs take equal ones. So TEON changes two things: what is orthogonalized together, and how far
queries, keys and values go. Four optimizers tell them apart: both with steps of either length.
"""

from __future__ import annotations

from collections.abc import Callable

from steepest.lab.papers.claim import Claim, Comparison, Numbers, Setting

_VARIANTS = "steepest.lab.papers.teon.variants"
_MUON, _SHORT_MUON = "muon:lr=0.04", f"{_VARIANTS}:ShortStepMuon:lr=0.04"
_STACKED, _LONG_STACKED = "teon:lr=0.04", "teon:length=muon,lr=0.04"
_MODE_2 = "teon:lr=0.04,mode=2"
_FOUR, _TWELVE = "teon:lr=0.04,stack=4", "teon:lr=0.04,stack=12"
_OUTPUTS = f"{_VARIANTS}:OutputStackingTEON:lr=0.04"
_ALL = f"{_VARIANTS}:AllStackingTEON:lr=0.04"
_FACTORIAL = (_MUON, _SHORT_MUON, _STACKED, _LONG_STACKED)

TEON_GPU_SIZES = {
    "model": "gpt", "width": 512, "depth": 8, "model_options": ("heads=8",), "context": 256,
    "batch": 64, "steps": 3000, "precision": "bfloat16", "tokenizer": "bpe:4096",
}  # fmt: skip
"""A GPT of about 30 million parameters, and some twice the text that there is."""
TEON_PAPER_SIZES = {
    "model": "gpt-124m", "context": 1024, "batch": 64, "accumulate": 8, "steps": 19000,
    "tokenizer": "gpt2", "precision": "bfloat16", "schedule": "teon", "weight_decay": 0.1,
    "momentum": 0.95, "clip": 1.0,
}  # fmt: skip
"""GPT-Small on ten billion tokens; what the paper leaves open is as in the group's Muon+."""

TEON_NARROW = Comparison(
    name="teon-narrow",
    title="TEON, Muon and variants on text, width 64",
    kind="real data",
    scales={
        "cpu": Setting(
            sizes={
                "optimizers": (*_FACTORIAL, _MODE_2, _FOUR, _OUTPUTS, _ALL),
                "width": 64, "depth": 4, "context": 64, "batch": 8, "steps": 150,
            },
            seeds=5, data="wikitext2", minutes=13,
        ),
        "gpu": Setting(
            sizes={
                "optimizers": (*_FACTORIAL, _MODE_2, _FOUR, _OUTPUTS, _ALL),
                **TEON_GPU_SIZES, "width": 256,
            },
            seeds=3, data="gutenberg", minutes=300, gigabytes=16, on_gpu=True,
        ),
        "paper": Setting(
            sizes={
                "optimizers": (*_FACTORIAL, _MODE_2, _FOUR, _TWELVE, _OUTPUTS, _ALL),
                **TEON_PAPER_SIZES, "steps": 4000,
            },
            seeds=3, data="fineweb", minutes=20000, gigabytes=70, on_gpu=True,
        ),
    },
)  # fmt: skip
TEON_WIDE = Comparison(
    name="teon-wide",
    title="TEON and Muon on text, width 128",
    kind="real data",
    scales={
        "cpu": Setting(
            sizes={
                "optimizers": _FACTORIAL,
                "width": 128, "depth": 4, "context": 64, "batch": 8, "steps": 150,
            },
            seeds=5, data="wikitext2", minutes=9,
        ),
        "gpu": Setting(
            sizes={"optimizers": _FACTORIAL, **TEON_GPU_SIZES},
            seeds=5, data="gutenberg", minutes=400, gigabytes=30, on_gpu=True,
        ),
        "paper": Setting(
            sizes={"optimizers": _FACTORIAL, **TEON_PAPER_SIZES},
            seeds=5, data="fineweb", minutes=60000, gigabytes=70, on_gpu=True,
        ),
    },
)  # fmt: skip

_GAIN = "loss of Muon minus that of TEON, in nats per token"


def losses_apart(first: str, second: str) -> Callable[[Numbers], float]:
    """Return the first optimizer's loss minus the second one's, from the numbers of a seed."""
    return lambda numbers: numbers[first] - numbers[second]


def _stacking(numbers: Numbers) -> float:
    """What stacking gains at equal length of steps, the mean of both lengths."""
    return (numbers[_MUON] + numbers[_SHORT_MUON] - numbers[_STACKED] - numbers[_LONG_STACKED]) / 2


def _shorter_steps(numbers: Numbers) -> float:
    """What shorter steps gain, the mean of with and without stacking."""
    return (numbers[_MUON] + numbers[_LONG_STACKED] - numbers[_SHORT_MUON] - numbers[_STACKED]) / 2


def _claims_of_size(comparison: Comparison, width: str, gpu: bool) -> tuple[Claim, ...]:
    checks = ("D2.e", "D3.c") if gpu else ("D2.e",)
    return (
        Claim(
            name=f"teon-gain-{width}",
            sentence=f"TEON has a lower loss than Muon, each at its best rate ({width} model).",
            place="Tables 1 and 2",
            source="second-hand",
            experiment=comparison,
            quantity=_GAIN,
            value=losses_apart(_MUON, _STACKED),
            low=0.0,
            paper="0.051 (GPT-Small), 0.020 (LLaMA-60M)",
            checks=checks,
        ),
        Claim(
            name=f"teon-stacking-{width}",
            sentence="Orthogonalizing layers together lowers the loss where steps are equally long "
            f"({width} model).",
            place="implied by Tables 1 and 2",
            source="ours",
            experiment=comparison,
            quantity="loss without stacking minus loss with it, mean of short and long steps, in "
            "nats per token",
            value=_stacking,
            low=0.0,
            paper="the whole gain",
            checks=checks,
        ),
        Claim(
            name=f"teon-shorter-steps-{width}",
            sentence="Steps of queries, keys and values shorter by sqrt(2) lower the loss by "
            f"themselves ({width} model).",
            place="not controlled in the paper",
            source="ours",
            experiment=comparison,
            quantity="loss with Muon's length minus loss with TEON's, mean of with and without "
            "stacking, in nats per token",
            value=_shorter_steps,
            low=0.0,
            checks=checks,
        ),
    )


CLAIMS = (
    *_claims_of_size(TEON_NARROW, "narrow", gpu=False),
    *_claims_of_size(TEON_WIDE, "wide", gpu=True),
    Claim(
        name="teon-better-mode",
        sentence="Stacking along the inputs (mode 1) has a lower loss than along the outputs.",
        place="ablation of modes",
        source="second-hand",
        experiment=TEON_NARROW,
        quantity="loss of mode 2 minus that of mode 1, in nats per token",
        value=losses_apart(_MODE_2, _STACKED),
        low=0.0,
        paper="0.007 (34.54 against 34.29)",
        checks=("D2.e",),
    ),
    Claim(
        name="teon-two-layers",
        sentence="Stacks of two layers have a lower loss than stacks of four.",
        place="ablation of K",
        source="second-hand",
        experiment=TEON_NARROW,
        quantity="loss of K = 4 minus that of K = 2, in nats per token",
        value=losses_apart(_FOUR, _STACKED),
        low=0.0,
        paper="K = 4 slightly worse",
        checks=("D2.e",),
    ),
    Claim(
        name="teon-outputs-apart",
        sentence="Stacking the attention's output projections too raises the loss.",
        place="ablation of matrices",
        source="second-hand",
        experiment=TEON_NARROW,
        quantity="loss with outputs stacked minus loss without, in nats per token",
        value=losses_apart(_OUTPUTS, _STACKED),
        low=0.0,
        paper="worse",
        checks=("D2.e",),
    ),
    Claim(
        name="teon-mlp-apart",
        sentence="Stacking all matrices, those of the MLP too, raises the loss.",
        place="ablation of matrices",
        source="second-hand",
        experiment=TEON_NARROW,
        quantity="loss with all stacked minus loss with q, k and v stacked, in nats per token",
        value=losses_apart(_ALL, _STACKED),
        low=0.0,
        paper="worse",
        checks=("D2.e",),
    ),
)
