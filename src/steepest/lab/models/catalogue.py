"""The page of the documentation on presets and models, written from what the code says of them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from steepest.lab.data.shapes import TextShape
from steepest.lab.models.family import MODELS
from steepest.lab.models.presets import PRESETS

_NO_OPTIONS = ("context", "width", "depth")  # of the data, and options of the command line


def catalogue() -> str:
    """Return `docs/presets.md`."""
    remarks = [f"- `{p.name}`: {p.remark}" for p in PRESETS.values() if p.remark]
    return "\n".join([_HEAD, *_presets(), _AWAY, *remarks, _OWN, *_models(), _DOORS])


def _presets() -> list[str]:
    rows = [
        "| name | width | depth | heads | inner | context | vocabulary | head | parameters | "
        "from the name's | source |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|---|",
    ]
    for preset in PRESETS.values():
        sizes = preset.sizes
        rows.append(
            f"| `{preset.name}` | {sizes.width} | {sizes.depth} | {sizes.heads} | {sizes.inner} | "
            f"{sizes.context} | {preset.vocabulary:,} | {'tied' if sizes.tied else 'untied'} | "
            f"{preset.parameters:,} | {100 * preset.difference:+.1f}% | {preset.source} |"
        )
    return rows


def _models() -> list[str]:
    rows = [
        "| name | what it is | takes | width | depth | options |",
        "|---|---|---|---:|---:|---|",
    ]
    for record in MODELS.values():
        sizes, types = record.sizes, get_type_hints(type(record.sizes))
        options = ", ".join(
            f"`{field.name}={_option(getattr(sizes, field.name), types[field.name])}`"
            for field in fields(sizes)
            if field.name not in _NO_OPTIONS
        )
        takes = "text" if record.takes is TextShape else "images"
        rows.append(
            f"| `{record.name}` | {record.label} | {takes} | {sizes.width} | {sizes.depth} | "
            f"{options} |"
        )
    return rows


def _option(default: Any, kind: Any) -> str:
    """The default of an option as it is typed, then what else it can be."""
    if get_origin(kind) is Literal:
        others = [word for word in get_args(kind) if word != default]
        return f"{default}` or `{'` or `'.join(others)}"
    if default is None:
        return "none"
    return str(default).lower() if isinstance(default, bool) else f"{default:g}"


_HEAD = """# Presets and models

A preset is a model of a paper by name: `steepest train --model llama-60m`. `--width`, `--depth` and
options such as `heads=8` change it, and so they do with every model below.

What follows from the width scales with it. Heads keep their size where the width is a multiple of
it. Where it is not, they keep their number if each has 8 units or more; otherwise one head is left.
The inner size keeps its ratio to the width, rounded to a multiple of 8.

## Presets

The vocabulary and context below are the source's. With other data the model gets the vocabulary of
the data, and has fewer or more parameters.

All GPTs have GPT-2's form: LayerNorm, learned positions, GELU by its tanh approximation, biases,
and a head that is the embedding table. All LLaMAs have RMSNorm, rotary positions and SwiGLU, no
biases, and a head of its own. Fresh weights are the lab's: they keep the size of their inputs.
"""
_AWAY = """
Where the number is more than 5% from the nominal one:
"""
_OWN = """
## Models of the lab

Width, depth and options are shown with their defaults.
"""
_DOORS = """
## All other models

`--model hf:resnet` is a model of transformers by its type, with fresh weights; it needs
`pip install 'steepest[hf]'`. A path to a `config.json`, or to a folder with one, is another form:
`--model hf:path/to/folder`. So is a name on the hub, which needs the network. Options name fields
of the configuration. The width of a ResNet is that of its stem; all stages scale with it. Its depth
is the number of layers of all stages together.

`--model my_package.module:build` is a function of your own that returns a module. It gets those of
`width`, `depth`, `vocabulary`, `context`, `channels`, `side`, `classes` and your options that its
signature names.
"""
