"""Shampoo to Muon as AdamW to Signum, in small batches and in large ones, on as many tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from steepest.lab.papers.claim import Claim, Comparison, Numbers, Setting
from steepest.lab.papers.clarifying_shampoo.token_efficiency import (
    LIKE_MUON,
    MUON,
    ahead,
    on_text,
)

_HALF = f"shampoo:{LIKE_MUON}"
_PAIRS = (MUON, _HALF, "adamw", "signum")


def _with_batches(batch: int, steps: int, share: float, minutes: float) -> Any:
    """Return the settings with other batches, and with steps for as many tokens.

    Args:
        batch, steps: of the cpu scale.
        share: of the usual batch, at the other scales.
        minutes: of the cpu scale.
    """

    def resized(name: str, setting: Setting) -> Setting:
        usual = setting.sizes
        other = {"batch": int(usual["batch"] * share), "steps": int(usual["steps"] / share)}
        sizes = {"batch": batch, "steps": steps} if name == "cpu" else other
        return replace(setting, sizes={**usual, **sizes})

    return {name: resized(name, setting) for name, setting in on_text(_PAIRS, minutes).items()}


SMALL_BATCH = Comparison(
    name="small-batch",
    title="Two adapted optimizers and two that are not, in small batches",
    kind="real data",
    scales=_with_batches(2, steps=800, share=1 / 4, minutes=6),
)
LARGE_BATCH = Comparison(
    name="large-batch",
    title="The same in large batches, on as many tokens",
    kind="real data",
    scales=_with_batches(16, steps=100, share=1, minutes=3),
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
        value=ahead(_HALF, MUON), low=-math.inf, high=0.02, source="ours",
    ),
)  # fmt: skip
