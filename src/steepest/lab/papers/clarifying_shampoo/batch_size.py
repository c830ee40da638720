"""Shampoo to Muon as AdamW to Signum, in small batches and in large ones, on as many tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from steepest.lab.papers.claim import Claim, Comparison, Numbers
from steepest.lab.papers.clarifying_shampoo.token_efficiency import (
    LIKE_MUON,
    MUON,
    ahead,
    on_text,
)

_HALF = f"shampoo:{LIKE_MUON}"
_PAIRS = (MUON, _HALF, "adamw", "signum")


def _with_batches(factor: float, steps: int, minutes: float) -> Any:
    """The settings of the comparison with a batch larger by a factor, and fewer steps."""
    scales = on_text(_PAIRS, minutes, steps)
    resized = {
        name: {
            "batch": int(setting.sizes["batch"] * factor),
            "steps": steps if name == "cpu" else int(setting.sizes["steps"] / factor),
        }
        for name, setting in scales.items()
    }
    return {
        name: replace(setting, sizes={**setting.sizes, **resized[name]})
        for name, setting in scales.items()
    }


SMALL_BATCH = Comparison(
    name="small-batch",
    title="Two adapted optimizers and two that are not, in batches a quarter as large",
    kind="real data",
    scales=_with_batches(1 / 4, steps=600, minutes=4),
)
LARGE_BATCH = Comparison(
    name="large-batch",
    title="The same in batches four times as large",
    kind="real data",
    scales=_with_batches(4, steps=100, minutes=4),
)


def _lesser_gain(numbers: Numbers) -> float:
    return min(ahead(_HALF, MUON)(numbers), ahead("adamw", "signum")(numbers))


def _claim(name: str, sentence: str, comparison: Comparison, **fields: Any) -> Claim:
    quantity = "the lesser of the gains of Shampoo 1/2 on Muon and of AdamW on Signum (nats)"
    standard = {"place": "Abstract", "source": "first-hand", "value": _lesser_gain, "low": 0.0}
    return Claim(
        name=name, sentence=sentence, experiment=comparison, checks=("D3.b",),
        **{"quantity": quantity, **standard, **fields},
    )  # fmt: skip


CLAIMS = (
    _claim(
        "adaptation-gains-in-small-batches",
        "In small batches Shampoo is to Muon what AdamW is to Signum: both are ahead.",
        SMALL_BATCH, paper="perplexity 25.31 against 26.31 with a batch of 64",
    ),
    _claim(
        "adaptation-gains-in-large-batches",
        "In large batches Shampoo is to Muon what AdamW is to Signum: both are ahead.",
        LARGE_BATCH, paper="perplexity 25.26 against 25.68 with a batch of 256",
    ),
    _claim(
        "large-batches-leave-little-to-adapt",
        "In large batches, which have little noise, Shampoo gains at most 0.02 nats on Muon.",
        LARGE_BATCH, quantity="gain of Shampoo 1/2 on Muon (nats per token)",
        value=ahead(_HALF, MUON), low=-float("inf"), high=0.02, source="ours",
    ),
)  # fmt: skip
