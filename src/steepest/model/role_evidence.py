"""What a forward pass shows of each parameter: output layers, orientation, experts, fused parts."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steepest.model.dataflow import Convolved, Dataflow, Use
from steepest.model.layouts import is_progression
from steepest.model.matrix_view import MatrixView
from steepest.model.role_guesses import (
    MATRIX_ROLES,
    NAMED,
    Guess,
    Role,
    attention_kinds,
    is_layer,
    is_qkv,
    plain_name,
)
from steepest.model.untouched import untouched

READ = "a table that is read by index"


class NotFollowed(ValueError):
    """The forward pass of an example could not be followed."""


def follow(model: nn.Module, example: Any) -> Dataflow:
    """Run `model` once on `example` and return what was seen; nothing is changed by it.

    Raises:
        NotFollowed: where the forward pass raises.
    """
    owners = {
        id(p): model.get_submodule(plain_name(name).rpartition(".")[0])
        for name, p in model.named_parameters()
    }
    kinds = [owners[id(p)] for p in model.parameters()]
    layers = [i for i, owner in enumerate(kinds) if is_layer(owner)]
    tables = [i for i, m in enumerate(kinds) if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    with untouched(model):
        flow = Dataflow(model, layers, tables)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"), flow:
                output = _call(model, example)
            with torch.enable_grad():
                flow.finish(output)
        except Exception as error:
            raise NotFollowed(
                f"got {type(error).__name__} from {type(model).__name__} on the example ({error}); "
                "expected what the model is called with: a tensor, a tuple of arguments, a "
                "dictionary of keyword arguments, or a function of the model"
            ) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_attention)
            flow.put_back()
    return flow


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, types.FunctionType | types.MethodType | partial):
        return example(model)
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def judge(number: int, name: str, parameter: Tensor, guess: Guess, flow: Dataflow) -> Guess:
    """Return what a parameter is by the evidence; where there is none, the guess."""
    if guess.layer:
        return _judge_layer(number, name, guess, flow)
    if parameter.ndim < 2 or not guess.guessed:
        return guess
    uses = flow.uses.get(number) or flow.constant_uses.get(number)
    if uses:
        return _multiplied(number, parameter, guess, uses, flow)
    known = replace(guess, guessed=False)
    if guess.role not in MATRIX_ROLES:
        seen = flow.read | flow.added | flow.entered | flow.computed | flow.layers
        return known if number in seen else guess
    view = guess.view
    if number in flow.read:
        return replace(known, role="embedding", reason=READ)
    if number in flow.entered:
        return replace(known, role="embedding", reason="what goes into a layer, as data")
    if number in flow.added:
        reason = "added or multiplied entry by entry"
        return replace(known, role="vector", view=None, reason=reason)
    if number in flow.computed and number not in flow.layers:
        return replace(known, role="vector", view=view, reason="never multiplied as it is")
    return guess


def _judge_layer(number: int, name: str, guess: Guess, flow: Dataflow) -> Guess:
    """A weight whose layout its layer says: how its result is split is what there is to see."""
    if number not in flow.layers:
        return guess
    known, view = replace(guess, guessed=False), guess.view
    parts = flow.parts.get(number)
    if view is None or view.batch != 1 or not parts or not guess.guessed:
        return known
    if guess.role == "vector" or flow.widths.get(number) != view.outputs:
        return known
    splits = _splits(parts, view.outputs)
    if not splits:
        one = view._replace(splits=())
        reason = f"{guess.reason.partition(';')[0]}; parts of its result are mixed: one matrix"
        known = replace(known, role="hidden" if guess.role == "qkv" else guess.role)
        return known if not view.splits else replace(known, view=one, reason=reason)
    if splits == view.splits:
        return known
    role: Role = "hidden" if guess.role == "qkv" else guess.role
    role = "qkv" if len(splits) == 3 and is_qkv(name) else role
    reason = (
        f"{guess.reason.partition(',')[0].partition(';')[0]}, its result split in {len(splits)}"
    )
    return replace(known, role=role, view=view._replace(splits=splits), reason=reason)


def _splits(parts: set[tuple[int, ...]], outputs: int) -> tuple[int, ...]:
    """The sizes of blocks of columns that make up all outputs, or none if they do not."""
    ordered = sorted(parts)
    blocks = [columns for columns in ordered if len(columns) == columns[-1] - columns[0] + 1]
    blocks = [  # a part of a part says nothing
        b for b in blocks if not any(set(b) < set(other) for other in blocks)
    ]
    if [c for block in blocks for c in block] == list(range(outputs)):
        return tuple(len(block) for block in blocks)
    steps = len(ordered)
    turns = [tuple(range(first, outputs, steps)) for first in range(steps)]
    return (1,) * steps if steps > 1 and ordered == turns else ()


def _multiplied(
    number: int, parameter: Tensor, guess: Guess, uses: list[Use | Convolved], flow: Dataflow
) -> Guess:
    """A bare parameter, which products show as a batch of matrices."""
    shape = tuple(parameter.shape)
    known = replace(guess, guessed=False, axes_known=True)
    keeps = guess.role in ("head", "embedding")
    if isinstance(use := uses[0], Convolved):
        flat = (shape[0], math.prod(shape[1:]))
        groups = math.gcd(use.groups, shape[0])
        kernel = MatrixView.of(flat, batch=groups, transposed=use.transposed)
        kind = guess.role if keeps else "conv"
        return _unless_vector(replace(known, role=kind, view=kernel, reason="convolved with"))
    products = [use for use in uses if isinstance(use, Use)]
    turned = _is_transposed(products[0])
    view = view_of(shape, [use for use in products if _is_transposed(use) in (turned, None)])
    if view is None:
        reason = f"{guess.reason}; multiplied in parts that make no batch of matrices"
        return replace(guess, reason=reason)
    order = "(in, out)" if view.transposed else "(out, in)"
    by_name = guess.view if guess.role == "experts" else None
    named = by_name is not None and by_name.transposed == view.transposed
    blocks = flow.blocks.get(number, by_name.batch if by_name is not None and named else 1)
    plain = len(shape) == 2 and view.is_plain
    if plain and blocks > 1 and view.rows % blocks == 0:
        view = MatrixView(blocks, view.rows // blocks, view.columns)
    elif len(shape) == 2 and view.batch > 1 and not view.transposed and guess.role != "experts":
        view = MatrixView(1, *shape, splits=(view.rows,) * view.batch)  # query, key and value, say
    if guess.view is not None and guess.view._replace(splits=()) == view:
        view = guess.view  # with the splits that are known
    elif number in flow.parts and flow.widths.get(number) == view.outputs:
        view = view._replace(splits=_splits(flow.parts[number], view.outputs))
    several = f"{view.batch} matrices of " if view.batch > 1 else ""
    reason = f"multiplied as {several}{order}"
    if keeps:
        return _unless_vector(replace(known, view=view, reason=f"{guess.reason}, {reason}"))
    by_name = guess.view if guess.role == "hidden" else None
    if view.batch == 1:
        return _unless_vector(replace(known, role="hidden", view=view, reason=reason))
    if _is_of_heads(number, flow) or (by_name is not None and by_name.batch == view.batch):
        reason = f"{reason}, one for each head"
        return _unless_vector(replace(known, role="hidden", view=view, reason=reason))
    if guess.reason.startswith(NAMED):
        reason = f"{reason}, {NAMED}"
    return _unless_vector(replace(known, role="experts", view=view, reason=reason))


def _is_of_heads(number: int, flow: Dataflow) -> bool:
    """Whether results of several matrices meet those of several others, as in attention."""
    return any(
        isinstance(use, Use) and len(_in_blocks(use).batch) > 1
        for other in flow.met.get(number, ())
        for use in flow.uses.get(other, ())
    )


def _is_transposed(use: Use | Convolved) -> bool | None:
    """Whether a product takes a weight as (in, out); None where a single row or column hides it."""
    if isinstance(use, Convolved):
        return use.transposed
    if min(len(use.inputs), len(use.outputs)) == 1:
        return None
    steps = (int(places.sort().values.diff().min()) for places in (use.inputs, use.outputs))
    return bool(next(steps) > next(steps))


def is_turned(number: int, flow: Dataflow) -> bool:
    """Whether a parameter is multiplied, or convolved with, both as it is and transposed."""
    return {True, False} <= {_is_transposed(use) for use in flow.uses.get(number, ())}


def notes(number: int, guess: Guess, flow: Dataflow) -> str:
    """What to add to the reason: of what several matrices may be, and a second use in the pass."""
    uses = flow.uses.get(number, [])
    gives = number in flow.outputs and guess.role != "head"
    unnamed = guess.role == "experts" and NAMED not in guess.reason and bool(uses)
    several = ", as of heads or experts" * unnamed
    if uses and number in flow.read:
        if guess.role != "embedding":
            return f"{several}, also read by index"
        return ", also multiplied" + " to give the model's output" * gives
    if is_turned(number, flow):
        again = "convolved with" if isinstance(uses[0], Convolved) else "multiplied"
        end = "; one of the two gives the model's output" * gives
        return f"{several}, also {again} transposed{end}"
    return several


def _unless_vector(guess: Guess) -> Guess:
    if guess.view is not None and guess.view.is_vector and guess.role in MATRIX_ROLES:
        return replace(guess, role="vector", reason=f"{guess.reason}: a single row or column")
    return guess


def view_of(shape: tuple[int, ...], uses: list[Use]) -> MatrixView | None:
    """Return the batch of matrices that a parameter was used as, or None if there is none.

    >>> rows, columns = torch.arange(4), torch.arange(6)
    >>> str(view_of((4, 6), [Use(0, 6 * rows, columns, torch.zeros(1, dtype=int))]))
    '(6, 4)'
    """
    total, steps = math.prod(shape), set()
    uses = [_in_blocks(use) for use in uses]
    for use in uses:
        inner, outer = _progression(use.inputs), _progression(use.outputs)
        if inner is None or outer is None:
            return None
        if min(inner[0], outer[0]) == 1:
            column = shape[0] == inner[0] > 1
            return (
                MatrixView.of(shape, transposed=column) if total == max(inner, outer)[0] else None
            )
        steps.add((inner[1], outer[1]))
    if len(steps) != 1:
        return None  # once this way and once the other
    step_in, step_out = steps.pop()
    transposed, columns = step_out < step_in, max(step_in, step_out)
    trailing = [math.prod(shape[i:]) for i in range(1, len(shape))]
    if min(step_in, step_out) != 1 or columns not in trailing:
        return None
    rows = total // columns
    row_spans, column_spans = set(), set()
    for use in uses:
        slow, fast = len(use.outputs), len(use.inputs)
        slow, fast = (fast, slow) if transposed else (slow, fast)
        for block in (use.base + use.batch).tolist():
            row_spans.add((block // columns, slow))
            column_spans.add((block % columns, fast))
    splits = _tiles(column_spans, columns) if transposed else ()
    sizes = {size for _, size in row_spans}
    several = len(row_spans) > 1 or (len(shape) == 3 and sizes == {rows // shape[0]})
    if rows in sizes or not several:
        return MatrixView(1, rows, columns, transposed, splits)
    if len(sizes) > 1:
        tiles = () if transposed else _tiles(row_spans, rows)
        return MatrixView(1, rows, columns, False, tiles) if tiles else None
    size = sizes.pop()
    if rows % size or any(start % size for start, _ in row_spans):
        return None
    return MatrixView(rows // size, size, columns, transposed, splits)


def _progression(places: Tensor) -> tuple[int, int] | None:
    """Number and step of equally spaced places in increasing order, or None."""
    if not is_progression(places):
        return None
    return (len(places), int(places[1] - places[0]) if len(places) > 1 else 0)


def _in_blocks(use: Use) -> Use:
    """The same in increasing order, with the outputs of one matrix; others are in its batch."""
    outputs, inputs = use.outputs.sort().values, use.inputs.sort().values
    steps = outputs.diff()
    if is_progression(outputs):
        return use._replace(outputs=outputs, inputs=inputs)
    run = int((steps != steps[0]).nonzero()[0]) + 1
    blocks = outputs.unflatten(0, (-1, run)) if len(outputs) % run == 0 else outputs[None]
    if not bool((blocks - blocks[:, :1] == blocks[:1] - blocks[0, 0]).all()):
        return use
    batch = (use.batch[:, None] + blocks[:, 0]).flatten()
    return Use(use.base, inputs, blocks[0], batch)


def _tiles(spans: set[tuple[int, int]], size: int) -> tuple[int, ...]:
    """The lengths of spans, given as start and length, if they follow each other up to `size`."""
    end = 0
    for start, length in sorted(spans):
        if start != end:
            return ()
        end += length
    return tuple(length for _, length in sorted(spans)) if end == size and len(spans) > 1 else ()


def is_output(number: int, name: str, guess: Guess, flow: Dataflow, named: bool) -> bool:
    """Whether a layer gives an output: its result gets there, and into no other layer.

    A layer that a name calls a head may feed others too, as one whose result is refined.
    """
    if number not in flow.outputs or guess.role == "embedding":
        return False
    if guess.view is None or (guess.view.inputs == 1 and guess.role == "vector"):
        return False  # a gain
    if attention_kinds(name, guess.role, guess.view) or "gate" in guess.reason:
        return False
    return named or not (flow.feeds[number] or number in flow.residual)


def chooses(number: int, model: nn.Module, path: str, flow: Dataflow) -> bool:
    """Whether a layer's result chooses between as many modules as it has outputs."""
    if number not in flow.chosen:
        return False
    width = flow.widths.get(number)
    parts = path.split(".")
    for i in range(len(parts)):
        for child in model.get_submodule(".".join(parts[:i])).children():
            if isinstance(child, nn.ModuleList) and len(child) == width and width > 1:
                return True
    return False
