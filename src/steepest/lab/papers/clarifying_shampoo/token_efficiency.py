"""Optimizers on text, each at its best rate, with updates of one size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steepest.lab.papers.claim import Claim, Comparison, Numbers, Setting

LIKE_MUON = "length=muon,lr=0.04,scale=spectral"
"""Options of the Shampoo family by which a matrix moves as far as one of Muon, at its rates."""

MUON = "muon:nesterov=false"
_QUARTER = f"shampoo-quarter:{LIKE_MUON}"
_HALF = f"shampoo:{LIKE_MUON}"
_ONE_SIDED = f"shampoo:{LIKE_MUON},sides=left"
_KL = f"kl-shampoo:{LIKE_MUON}"
_MATCHED = (
    MUON, "adamw", "signum", "spectral-descent", _QUARTER, _HALF, _ONE_SIDED, _KL, "soap",
)  # fmt: skip

SMALL_GPT: dict[str, Any] = {
    "model": "gpt", "width": 48, "depth": 2, "context": 64, "batch": 8,
}  # fmt: skip
"""80,000 parameters, 512 bytes in a step."""
GPT_FOR_ONE_GPU: dict[str, Any] = {
    "model": "gpt", "width": 384, "depth": 8, "model_options": ("heads=6",), "context": 256,
    "batch": 64, "tokenizer": "bpe:4096", "steps": 1800, "precision": "bfloat16",
}  # fmt: skip
"""16 million parameters, 30 million tokens."""
GPT_OF_THE_PAPER: dict[str, Any] = {
    "model": "llama-350m", "width": 768, "depth": 18, "context": 2048, "tokenizer": "gpt2",
    "batch": 32, "accumulate": 8, "steps": 6104, "schedule": "cosine", "clip": 1.0,
    "weight_decay": 0.1, "precision": "bfloat16",
}  # fmt: skip
"""The paper's shape and budget: 320 million parameters, 3.2 billion tokens."""


def on_text(optimizers: tuple[str, ...], minutes: float, steps: int = 250) -> Any:
    """Return the settings of a comparison of optimizers at all scales.

    Args:
        optimizers: the first is the baseline.
        minutes: of the cpu scale.
        steps: of the cpu scale.
    """
    shared = {"optimizers": optimizers}
    return {
        "cpu": Setting(
            sizes={**SMALL_GPT, **shared, "steps": steps}, seeds=5, data="wikitext2",
            minutes=minutes,
        ),
        "gpu": Setting(
            sizes={**GPT_FOR_ONE_GPU, **shared}, seeds=3, data="gutenberg",
            minutes=20 * len(optimizers), gigabytes=10, on_gpu=True,
        ),
        "paper": Setting(
            sizes={**GPT_OF_THE_PAPER, **shared}, seeds=10, data="c4",
            minutes=10_000 * len(optimizers), gigabytes=70, on_gpu=True,
        ),
    }  # fmt: skip


TOKEN_EFFICIENCY = Comparison(
    name="token-efficiency",
    title="Nine optimizers on text, each at its best rate, with updates as long as Muon's",
    kind="real data",
    scales=on_text(_MATCHED, minutes=9),
)


def ahead(better: str, worse: str) -> Callable[[Numbers], float]:
    """The loss of `worse` less that of `better`, in nats a token."""
    return lambda numbers: float(numbers[worse] - numbers[better])


def _claim(name: str, sentence: str, better: str, worse: str, **fields: Any) -> Claim:
    quantity = f"validation loss of {worse} less that of {better} (nats per token)"
    standard = {"place": "Table 1", "source": "second-hand", "checks": ("D3.a",)}
    return Claim(
        name=name, sentence=sentence, experiment=TOKEN_EFFICIENCY, quantity=quantity,
        value=ahead(better, worse), low=0.0, **{**standard, **fields},
    )  # fmt: skip


CLAIMS = (
    _claim(
        "muon-ahead-of-adamw", "Muon needs fewer tokens than AdamW.", MUON, "adamw",
        paper="perplexity 25.68 against 27.74",
    ),
    _claim(
        "shampoo-ahead-of-muon",
        "Shampoo 1/2 is ahead of Muon with updates of one size.", _HALF, MUON,
        place="Abstract, Table 1", paper="perplexity 25.26 against 25.68",
    ),
    _claim(
        "kl-shampoo-ahead-of-muon", "KL-Shampoo is ahead of Muon with updates of one size.",
        _KL, MUON, paper="perplexity 24.95 against 25.68",
    ),
    _claim(
        "kl-shampoo-ahead-of-shampoo", "KL-Shampoo is ahead of Shampoo 1/2.", _KL, _HALF,
        paper="perplexity 24.95 against 25.26",
    ),
    _claim(
        "adamw-ahead-of-signum", "AdamW needs fewer tokens than Signum.", "adamw", "signum",
        place="Abstract", source="first-hand", checks=("D3.a",),
    ),
    _claim(
        "half-ahead-of-quarter", "Shampoo 1/2 is ahead of the original Shampoo 1/4.", _HALF,
        _QUARTER, place="Summary",
    ),
    _claim(
        "two-sides-ahead-of-one", "Two-sided preconditioning is critical: one side is worse.",
        _HALF, _ONE_SIDED, place="Summary",
    ),
    _claim(
        "momentum-ahead-of-none", "Spectral descent without momentum is behind Muon.", MUON,
        "spectral-descent", place="Records of modded-nanogpt",
        paper="8225 steps against 3325", checks=("D2.g",),
    ),
    _claim(
        "kl-shampoo-ahead-of-soap", "KL-Shampoo is ahead of SOAP.", _KL, "soap",
        place="arXiv 2509.03378", source="first-hand",
    ),
)  # fmt: skip
