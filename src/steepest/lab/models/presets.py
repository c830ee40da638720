"""The papers' models by name: their shapes, and where these are from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from steepest.lab.data.shapes import TextShape
from steepest.lab.models.gpt import GPT2
from steepest.lab.models.llama import LlamaConfig

GPT2_VOCABULARY = 50_257
LLAMA_VOCABULARY = 32_000


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model of a paper.

    Attributes:
        name: on command lines.
        family: name of the model that it is.
        sizes: of that model.
        vocabulary: of the paper; with other data that of the data is used.
        nominal: parameters that the paper's name for it says.
        source: of the shape.
        remark: why our number of parameters is not the nominal one, where it is over 5% away.
    """

    name: str
    family: str
    sizes: Any
    vocabulary: int
    nominal: float
    source: str
    remark: str = ""

    @property
    def shape(self) -> TextShape:
        """The data of the paper."""
        return TextShape(self.vocabulary, self.sizes.context)

    @property
    def parameters(self) -> int:
        """Number of parameters with the paper's vocabulary and context."""
        return self.sizes.count(self.shape)[0]

    @property
    def difference(self) -> float:
        """How far that is from the nominal number, as a fraction of it."""
        return self.parameters / self.nominal - 1


def _gpt(name: str, nominal: float, width: int, depth: int, heads: int, source: str) -> Preset:
    sizes = replace(GPT2, width=width, depth=depth, heads=heads)
    return Preset(
        name=name,
        family="gpt",
        sizes=sizes,
        vocabulary=GPT2_VOCABULARY,
        nominal=nominal,
        source=source,
    )


def _llama(
    name: str, nominal: float, width: int, depth: int, heads: int, inner: int, remark: str = ""
) -> Preset:
    sizes = LlamaConfig(context=1024, width=width, depth=depth, heads=heads, inner=inner)
    return Preset(
        name=name,
        family="llama",
        sizes=sizes,
        vocabulary=LLAMA_VOCABULARY,
        nominal=nominal,
        source="GaLore (arXiv 2403.03507), its published configuration of this name",
        remark=remark,
    )


_RADFORD = "GPT-2 (Radford et al. 2019)"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            _gpt("gpt-124m", 124e6, 768, 12, 12, f"{_RADFORD}, its smallest"),
            _gpt(
                "gpt-362m",
                362e6,
                1024,
                24,
                16,
                f"{_RADFORD}, its second; Muon+ (arXiv 2602.21545) gives this width, depth and "
                "number of heads",
            ),
            _gpt("gpt-774m", 774e6, 1280, 36, 20, f"{_RADFORD}, its third"),
            _llama("llama-60m", 60e6, 512, 8, 8, 1376),
            _llama("llama-130m", 130e6, 768, 12, 12, 2048),
            _llama(
                "llama-350m",
                350e6,
                1024,
                24,
                16,
                2736,
                "The head is not tied. Without its 33M parameters it would be 335M.",
            ),
            _llama(
                "llama-1b",
                1e9,
                2048,
                24,
                32,
                5461,
                "The name is rounded down: 24 blocks of 50M are 1208M, and the two tables 131M.",
            ),
        )
    }
)
"""From a name to its preset."""


def preset_context(name: str) -> int | None:
    """Return the context length that the paper of a preset trains with; None for other models.

    >>> preset_context("llama-60m"), preset_context("gpt")
    (1024, None)
    """
    return PRESETS[name].sizes.context if name in PRESETS else None
