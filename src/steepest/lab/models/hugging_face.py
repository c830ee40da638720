"""The door to Hugging Face: a model by its type, a configuration, or a name on the hub.

Weights are always fresh. The configuration is adapted to the data, to width and depth, and to
options, which name its fields.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from steepest.lab.arguments import did_you_mean
from steepest.lab.data.hub_access import hub_answers
from steepest.lab.data.shapes import ImageShape, Shape, TextShape
from steepest.lab.errors import InputError
from steepest.lab.models.resizing import heads_for, split_option
from steepest.model.attention_sizes import HEAD_SIZE, HEADS, KV_HEADS, WIDTH

DOOR = "hf:"
_WIDTHS = (*WIDTH, "dim", "hidden_dim")
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers")
_CONTEXTS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
)
_FOLLOWING_WIDTH = (
    "intermediate_size", "n_inner", "ffn_dim", "d_ff", "mlp_dim", "d_inner", "ffn_hidden_size",
    "moe_intermediate_size", "shared_expert_intermediate_size", "pooler_output_size",
)  # fmt: skip
_ROUNDING = 8
_PATCHES = 7
"""Fewest patches along a side that a default patch size is cut down to."""


def hugging_face_model(
    name: str, shape: Shape, width: int | None, depth: int | None, options: Sequence[str]
) -> nn.Module:
    """Return a model with fresh float32 weights; `model(inputs).logits` are its logits.

    Args:
        name: behind "hf:", the path of a configuration or of a folder that has a `config.json`, a
            type of model ("gpt2", "resnet"), or "owner/name" on the hub.
        shape: of the data; None leaves the configuration as it is.
        width: the residual stream's; heads and inner sizes follow. Where a model has a size for
            each stage, as a ResNet has, the width is that of its stem, and all sizes follow.
        depth: the number of layers; of all stages together, where there are stages.
        options: fields of the configuration, such as "hidden_act=relu".

    Raises:
        InputError: for a name that leads nowhere, data that the model is not for, fields that the
            configuration does not have, and values that transformers refuses.
    """
    hf = transformers_or_sentence()
    config = _config(name, shape, width, depth, options)
    images = isinstance(shape, ImageShape) or (
        shape is None and type(config) not in hf.MODEL_FOR_CAUSAL_LM_MAPPING
    )
    door = hf.AutoModelForImageClassification if images else hf.AutoModelForCausalLM
    known = hf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if images else hf.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in known:
        task = "classifies images" if images else "predicts the next token"
        raise InputError(
            f"got {name!r}, but transformers has no {config.model_type} that {task}; expected "
            f"another type, such as {'hf:resnet or hf:vit' if images else 'hf:gpt2 or hf:llama'}"
        )
    try:
        return door.from_config(config).float()
    except (ValueError, TypeError, RuntimeError, ImportError, ZeroDivisionError) as error:
        raise InputError(
            f"got {name!r}, which transformers cannot build like this: {error}"
        ) from error


def hugging_face_sizes(
    name: str, shape: Shape, width: int | None, depth: int | None, options: Sequence[str]
) -> tuple[int | None, int | None, int | None]:
    """Return the width, depth and number of heads that the model would have, None where unknown."""
    config = _config(name, shape, width, depth, options)
    layers, heads = _depth_axis(config), _first(config, HEADS)
    return (
        _width(config),
        None if layers is None else _total(getattr(config, layers)),
        None if heads is None else getattr(config, heads),
    )


def hugging_face_takes_images(name: str) -> bool:
    """Whether a type of model, or one whose configuration is here, classifies images only.

    Of a name on the hub nothing is asked, and the answer is no.
    """
    place = name.removeprefix(DOOR)
    hf = transformers_or_sentence()
    if place not in hf.CONFIG_MAPPING and not Path(place).expanduser().exists():
        return False
    kind = _origin(place)[0]
    text, images = hf.MODEL_FOR_CAUSAL_LM_MAPPING, hf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    return kind in images and kind not in text


def transformers_or_sentence() -> Any:
    """Return the package transformers.

    Raises:
        InputError: where it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "got a Hugging Face model, but transformers is not installed; install it with "
            "pip install 'steepest[hf]'"
        ) from error
    return transformers


def _config(
    name: str, shape: Shape, width: int | None, depth: int | None, options: Sequence[str]
) -> Any:
    """The configuration, adapted; what it derives from its fields is derived anew."""
    kind, fields, by_type = _origin(name.removeprefix(DOOR))
    before = _made(name, kind, fields)
    asked = _options(name, before, options)
    fields = {**fields, **_of_data(name, before, shape, by_type), **asked}
    config = _made(name, kind, fields)
    if width is not None:
        fields |= _of_width(name, config, width, asked)
        resized = _made(name, kind, fields)
        fields |= _scaled(config, resized, width, asked)
    if depth is not None:
        fields |= _of_depth(name, config, depth)
    return _made(name, kind, fields)


def _origin(place: str) -> tuple[Any, dict[str, Any], bool]:
    """The class of a configuration, its fields, and whether only its type was named."""
    hf = transformers_or_sentence()
    path = Path(place).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            fields = json.loads(file.read_text())
            kind = hf.CONFIG_MAPPING[fields["model_type"]]
            return kind, _without_precision(fields), False
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"got {DOOR}{place}, but {file} is no configuration of a model that transformers "
                f"{hf.__version__} knows; expected JSON with its type under model_type"
            ) from error
    if place in hf.CONFIG_MAPPING:
        return hf.CONFIG_MAPPING[place], {}, True
    if place.count("/") != 1 or place.startswith((".", "/", "~")):
        raise InputError(
            f"got {DOOR}{place}{did_you_mean(place, hf.CONFIG_MAPPING)}, which is no file, no "
            "folder with a config.json, and no type of model that transformers knows; expected one "
            "of these, or owner/name on the hub"
        )
    try:
        config = hf.AutoConfig.from_pretrained(place, local_files_only=not hub_answers())
    except (OSError, ValueError) as error:
        raise InputError(
            f"got {DOOR}{place}, which is neither here nor to be had from the hub; check the name "
            "and the network, or download its config.json where there is one and give the path. "
            f"transformers says: {str(error).splitlines()[0]}"
        ) from error
    return type(config), _without_precision(config.to_diff_dict()), False


def _without_precision(fields: dict[str, Any]) -> dict[str, Any]:
    """Without the type of stored weights, so that fresh ones are drawn in float32."""
    return {name: value for name, value in fields.items() if name not in ("dtype", "torch_dtype")}


def _made(name: str, kind: Any, fields: Mapping[str, Any]) -> Any:
    try:
        return kind.from_dict(dict(fields))
    except Exception as error:  # transformers has classes of its own for what it refuses
        said = " ".join(str(error).split())
        raise InputError(f"got {name!r} with sizes that transformers refuses: {said}") from error


def _first(config: Any, names: Sequence[str]) -> str | None:
    """The first of the names that is a whole number which the configuration keeps."""
    fields = config.to_dict()
    keeps = (n for n in names if isinstance(fields.get(_field(config, n)), int))
    return next(keeps, None)


def _width_axis(config: Any) -> str | None:
    if _by_stage(config, "hidden_sizes"):
        return _first(config, ("embedding_size",)) or "hidden_sizes"
    return _first(config, _WIDTHS)


def _width(config: Any) -> int | None:
    axis = _width_axis(config)
    width = None if axis is None else getattr(config, axis)
    return width[0] if isinstance(width, list | tuple) else width


def _depth_axis(config: Any) -> str | None:
    return "depths" if _by_stage(config, "depths") else _first(config, _DEPTHS)


def _by_stage(config: Any, name: str) -> bool:
    return isinstance(getattr(config, name, None), list | tuple)


def _total(layers: Any) -> int:
    return sum(layers) if isinstance(layers, list | tuple) else int(layers)


def _field(config: Any, name: str) -> str:
    """The name under which a configuration keeps a field."""
    return dict(config.attribute_map).get(name, name)


# ------------------------------------------------------------------------------ what is adapted


def _options(name: str, config: Any, options: Sequence[str]) -> dict[str, Any]:
    """Fields from options; values are read as JSON, or else as text."""
    known = {**config.to_dict(), **dict(config.attribute_map)}
    values = {}
    for option in options:
        key, text = split_option(option)
        if key not in known:
            raise InputError(
                f"got the option {option!r}, but the configuration of {name!r} has no {key}"
                f"{did_you_mean(key, known)}; it has {', '.join(sorted(known))}"
            )
        try:
            values[_field(config, key)] = json.loads(text)
        except ValueError:
            values[_field(config, key)] = None if text == "none" else text
    return values


def _of_data(name: str, config: Any, shape: Shape, by_type: bool) -> dict[str, Any]:
    if isinstance(shape, TextShape):
        return _of_text(name, config, shape)
    if isinstance(shape, ImageShape):
        return _of_images(name, config, shape, by_type)
    return {}


def _of_text(name: str, config: Any, shape: TextShape) -> dict[str, Any]:
    if not hasattr(config, "vocab_size"):
        raise InputError(f"got the model {name!r}, which has no vocabulary, for text")
    fields: dict[str, Any] = {_field(config, "vocab_size"): shape.vocabulary}
    for context in _CONTEXTS:
        if isinstance(getattr(config, context, None), int):
            fields[_field(config, context)] = shape.context
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):  # those of another vocabulary
        if hasattr(config, token):
            fields[token] = None
    fields |= {"use_cache": False} if hasattr(config, "use_cache") else {}
    return fields | ({"is_decoder": True} if "is_decoder" in config.to_dict() else {})


def _of_images(name: str, config: Any, shape: ImageShape, by_type: bool) -> dict[str, Any]:
    if not hasattr(config, "num_channels"):
        raise InputError(f"got the model {name!r}, which has no channels, for images")
    fields: dict[str, Any] = {_field(config, "num_channels"): shape.channels}
    fields["num_labels"] = shape.classes
    if hasattr(config, "image_size"):
        fields[_field(config, "image_size")] = shape.side
        patch = getattr(config, "patch_size", None)
        if by_type and isinstance(patch, int):
            most = max(1, min(patch, shape.side // _PATCHES))
            fields["patch_size"] = max(p for p in range(1, most + 1) if shape.side % p == 0)
        elif isinstance(patch, int) and patch > shape.side:
            raise InputError(
                f"got images of side {shape.side} for {name!r}, whose patches have side {patch}; "
                "expected an option patch_size=... that divides it"
            )
    return fields


def _of_width(name: str, config: Any, width: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of width and heads; a head keeps its size where the width is a multiple of it."""
    axis = _width_axis(config)
    if axis is None:
        raise InputError(
            f"got width={width}, but the configuration of {name!r} has no width by a usual name; "
            "set its fields by options"
        )
    fields: dict[str, Any] = {} if axis == "hidden_sizes" else {_field(config, axis): width}
    heads = _first(config, HEADS)
    if heads is None or _field(config, heads) in asked:
        return fields
    number, old = getattr(config, heads), getattr(config, axis)
    size = max(1, old // number)
    new = next(heads_for(width, size, number))
    fields[_field(config, heads)] = new
    kv_heads, head_size = _first(config, KV_HEADS), _first(config, HEAD_SIZE)
    if kv_heads is not None and _field(config, kv_heads) not in asked:
        shared = max(1, number // getattr(config, kv_heads))
        fields[_field(config, kv_heads)] = new // shared if new % shared == 0 else 1
    if head_size is not None and _field(config, head_size) not in asked:
        same = new * size == width
        fields[_field(config, head_size)] = getattr(config, head_size) if same else width // new
    return fields


def _scaled(config: Any, resized: Any, width: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that keep their ratio to the width, where the configuration does not derive them."""
    old_width = _width(config)
    assert old_width is not None
    ratio = width / old_width
    fields: dict[str, Any] = {}
    if _by_stage(config, "hidden_sizes") and "hidden_sizes" not in asked:
        sizes = [size * ratio for size in config.hidden_sizes]
        if any(size != round(size) or size < 1 for size in sizes):
            raise InputError(
                f"got width={width}, which would make sizes {sizes} of the stages' "
                f"{config.hidden_sizes}; expected whole numbers"
            )
        fields["hidden_sizes"] = [round(size) for size in sizes]
    for key in _FOLLOWING_WIDTH:
        old, field = getattr(config, key, None), _field(config, key)
        if not isinstance(old, int) or getattr(resized, key) != old or field in asked:
            continue
        rounded = max(_ROUNDING, _ROUNDING * round(old * ratio / _ROUNDING))
        fields[field] = width if old == old_width else rounded
    return fields


def _of_depth(name: str, config: Any, depth: int) -> dict[str, Any]:
    axis = _depth_axis(config)
    if axis is None:
        raise InputError(
            f"got depth={depth}, but the configuration of {name!r} has no number of layers by a "
            "usual name; set its fields by options"
        )
    layers = getattr(config, axis)
    if axis != "depths":
        return {_field(config, axis): depth}
    if depth < len(layers):
        raise InputError(
            f"got depth={depth} for {name!r}, which has {len(layers)} stages; expected at least "
            "one layer for each"
        )
    return {axis: _shared_out(depth, layers)}


def _shared_out(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers of at least 1 with this sum, as near to the weights' proportions as can be.

    >>> _shared_out(16, [3, 4, 6, 3]), _shared_out(4, [3, 4, 6, 3]), _shared_out(8, [3, 4, 6, 3])
    ([3, 4, 6, 3], [1, 1, 1, 1], [2, 2, 3, 1])
    """
    shares = [total * weight / sum(weights) for weight in weights]
    parts = [max(1, math.floor(share)) for share in shares]
    while sum(parts) != total:
        gaps = [share - part for share, part in zip(shares, parts, strict=True)]
        step = 1 if sum(parts) < total else -1
        open_ = [i for i, part in enumerate(parts) if part + step >= 1]
        parts[max(open_, key=lambda i: step * gaps[i])] += step
    return parts
