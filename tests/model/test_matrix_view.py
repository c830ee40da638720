from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest import MatrixView, Muon


def _numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


CASES = {
    "linear": (MatrixView.of((4, 6)), (4, 6), [(4, 6)]),
    "convolution": (MatrixView.of((4, 3, 2, 2)), (4, 3, 2, 2), [(4, 12)]),
    "groups": (MatrixView.of((6, 2, 3, 3), batch=3), (6, 2, 3, 3), [(2, 18)] * 3),
    "experts": (MatrixView.of((5, 4, 3), batch=5), (5, 4, 3), [(4, 3)] * 5),
    "experts, inputs first": (
        MatrixView.of((5, 3, 4), batch=5, transposed=True),
        (5, 3, 4),
        [(4, 3)] * 5,
    ),
    "inputs first": (MatrixView.of((6, 4), transposed=True), (6, 4), [(4, 6)]),
    "fused, grouped queries": (
        MatrixView.of((16, 8), splits=(8, 4, 4)),
        (16, 8),
        [(8, 8), (4, 8), (4, 8)],
    ),
    "fused, inputs first": (
        MatrixView.of((4, 12), transposed=True, splits=(4, 4, 4)),
        (4, 12),
        [(4, 4)] * 3,
    ),
    "fused experts": (
        MatrixView.of((2, 6, 4), batch=2, splits=(3, 3)),
        (2, 6, 4),
        [(3, 4)] * 4,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_matrices_have_the_stated_shapes_and_hold_every_entry_once(name: str) -> None:
    view, shape, shapes = CASES[name]
    tensor = _numbered(*shape)
    matrices = view.matrices(tensor)
    assert [tuple(W.shape) for W in matrices] == shapes
    entries = torch.cat([W.flatten() for W in matrices])
    assert torch.equal(entries.sort().values, tensor.flatten())
    assert view.batch * view.inputs * view.outputs == tensor.numel()


@pytest.mark.parametrize("name", CASES)
def test_writing_to_the_matrices_writes_to_the_parameter(name: str) -> None:
    view, shape, _ = CASES[name]
    parameter = nn.Parameter(torch.zeros(shape))
    source = view.matrices(_numbered(*shape))
    with torch.no_grad():
        for W, new in zip(view.matrices(parameter), source, strict=True):
            W.copy_(new)
    assert torch.equal(parameter, _numbered(*shape))  # and so the round trip is the identity


BLOCKS = [None, 1, 2, 3, 4, 5, 7, 100]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", CASES)
def test_blocks_have_the_stated_shapes_and_hold_every_entry_once(
    name: str, block: int | None
) -> None:
    view, shape, whole = CASES[name]
    tensor = _numbered(*shape)
    blocks = view.matrices(tensor, block)
    assert [tuple(W.shape) for W in blocks] == view.block_shapes(block)
    assert len(view.sizes(block)) == len(blocks)
    entries = torch.cat([W.flatten() for W in blocks])
    assert torch.equal(entries.sort().values, tensor.flatten())
    assert set(view.sizes(block)) == set(whole)
    if block is not None:
        assert all(max(W.shape) <= block for W in blocks)
        if block >= max(max(size) for size in whole):
            assert view.block_shapes(block) == whole


@pytest.mark.parametrize("block", [2, 5])
@pytest.mark.parametrize("name", CASES)
def test_writing_to_the_blocks_writes_to_the_parameter(name: str, block: int) -> None:
    view, shape, _ = CASES[name]
    parameter = nn.Parameter(torch.zeros(shape))
    with torch.no_grad():
        for W, new in zip(
            view.matrices(parameter, block), view.matrices(_numbered(*shape), block), strict=True
        ):
            W.copy_(new)
    assert torch.equal(parameter, _numbered(*shape))


@pytest.mark.parametrize("block", [1, 3, 4, 5, 6, 13])
@pytest.mark.parametrize("size", [1, 2, 5, 12, 13, 25])
def test_blocks_are_as_few_and_as_equal_as_possible(size: int, block: int) -> None:
    rows = [shape[0] for shape in MatrixView(1, size, 1).block_shapes(block)]
    assert len(rows) == -(-size // block)
    assert sum(rows) == size
    assert max(rows) - min(rows) <= 1
    assert rows == sorted(rows, reverse=True)
    assert MatrixView(1, 1, size).block_shapes(block) == [(1, n) for n in rows]


def test_blocks_come_matrix_by_matrix_then_row_by_row() -> None:
    view = MatrixView.of((2, 3, 4), batch=2)
    assert view.block_shapes(2) == [(2, 2), (2, 2), (1, 2), (1, 2)] * 2
    corners = [int(W[0, 0]) for W in view.matrices(_numbered(2, 3, 4), 2)]
    assert corners == [0, 2, 8, 10, 12, 14, 20, 22]


def test_blocks_never_reach_over_a_split() -> None:
    view = MatrixView.of((12, 6), splits=(5, 5, 2))
    assert view.sizes() == view.block_shapes() == [(5, 6), (5, 6), (2, 6)]
    assert view.block_shapes(4) == [(3, 3), (3, 3), (2, 3), (2, 3)] * 2 + [(2, 3), (2, 3)]
    assert view.sizes(4) == [(5, 6)] * 8 + [(2, 6)] * 2


def test_matrices_of_a_linear_layer_multiply_as_it_does() -> None:
    layer, x = nn.Linear(5, 3, bias=False), torch.randn(7, 5)
    (W,) = MatrixView.of(layer.weight.shape).matrices(layer.weight)
    assert torch.allclose(layer(x), x @ W.mT)


@pytest.mark.parametrize("groups", [1, 2])
def test_matrices_of_a_convolution_multiply_as_it_does(groups: int) -> None:
    layer = nn.Conv2d(4, 6, 3, groups=groups, bias=False)
    images = torch.randn(2, 4, 5, 5)
    patches = nn.functional.unfold(images, 3).unflatten(1, (groups, -1))  # groups of rows
    matrices = MatrixView.of(layer.weight.shape, batch=groups).matrices(layer.weight)
    parts = [W @ patches[:, g] for g, W in enumerate(matrices)]
    assert torch.allclose(layer(images).flatten(2), torch.cat(parts, 1), atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_matrices_of_a_transposed_convolution_multiply_as_it_does(groups: int) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    images = torch.randn(2, 4, 5, 5)
    view = MatrixView.of(layer.weight.shape, batch=groups, transposed=True)
    assert (view.outputs, view.inputs) == (6 // groups * 9, 4 // groups)
    pixels = images.flatten(2).unflatten(1, (groups, -1))
    patches = [W @ pixels[:, g] for g, W in enumerate(view.matrices(layer.weight))]
    folded = nn.functional.fold(torch.cat(patches, 1), (7, 7), 3)
    assert torch.allclose(layer(images), folded, atol=1e-5)


def test_splits_of_a_fused_projection_are_query_key_and_value() -> None:
    layer, x = nn.Linear(8, 16, bias=False), torch.randn(3, 8)
    query, key, value = layer(x).split([8, 4, 4], -1)
    view = MatrixView.of((16, 8), splits=(8, 4, 4))
    for W, out in zip(view.matrices(layer.weight), (query, key, value), strict=True):
        assert torch.allclose(x @ W.mT, out, atol=1e-6)


def test_a_tensor_that_is_not_contiguous_is_refused_and_not_copied() -> None:
    with pytest.raises((RuntimeError, ValueError), match="view"):
        MatrixView.of((4, 3, 2)).matrices(torch.zeros(4, 2, 3).mT)


def test_single_rows_and_columns_are_vectors() -> None:
    assert MatrixView.of((1, 5)).is_vector
    assert MatrixView.of((5, 1)).is_vector
    assert MatrixView.of((6, 1, 3, 3), batch=6).is_vector  # depthwise
    assert not MatrixView.of((6, 1, 3, 3)).is_vector
    assert not MatrixView.of((2, 2)).is_vector


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (2, 0, 2)])
def test_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a matrix or more"):
        MatrixView.of(shape)


@pytest.mark.parametrize("batch", [0, -1, 4, 7])
def test_batch_must_divide_the_rows(batch: int) -> None:
    with pytest.raises(ValueError, match=f"batch={batch}, .* 6 rows"):
        MatrixView.of((6, 4), batch=batch)


def test_splits_must_add_up_to_the_outputs() -> None:
    with pytest.raises(ValueError, match="add up to 12 outputs"):
        MatrixView.of((12, 4), splits=(4, 4))
    with pytest.raises(ValueError, match="add up to 4 outputs"):
        MatrixView.of((12, 4), transposed=True, splits=(4, 4, 4))


def test_a_view_must_fit_the_parameter() -> None:
    view = MatrixView(2, 3, 4)
    view.check((6, 4))
    with pytest.raises(ValueError, match=r"2 x \(3, 4\) .*\(5, 4\)"):
        view.check((5, 4))
    with pytest.raises(RuntimeError, match="input of size 20"):
        view.matrices(torch.zeros(5, 4))


def test_prints_the_outputs_first() -> None:
    assert str(MatrixView.of((4, 6))) == "(4, 6)"
    assert str(MatrixView.of((6, 4), transposed=True)) == "(4, 6)"
    assert str(MatrixView.of((8, 64, 32), batch=8)) == "8 x (64, 32)"
    assert str(MatrixView.of((16, 8), splits=(8, 4, 4))) == "(8+4+4, 8)"
    assert str(MatrixView.of((4, 12), transposed=True, splits=(4, 4, 4))) == "(3 x 4, 4)"


WRONG = [
    ({"batch": 0}, "batch=0 for a MatrixView"),
    ({"batch": True}, "got batch=True"),
    ({"rows": -8}, "got rows=-8"),
    ({"rows": 8.0}, "got rows=8.0"),
    ({"columns": None}, "got columns=None"),
    ({"columns": "6"}, "got columns='6'"),
    ({"transposed": 1}, "transposed=1 for a MatrixView"),
    ({"transposed": "no"}, "got transposed='no'"),
    ({"splits": (8, 0)}, r"got splits=\(8, 0\)"),
    ({"splits": (-4, 12)}, r"got splits=\(-4, 12\)"),
    ({"splits": (4.0, 4)}, r"got splits=\(4.0, 4\)"),
    ({"splits": (True, True)}, r"got splits=\(True, True\)"),
    ({"splits": (None, 8)}, r"got splits=\(None, 8\)"),
    ({"splits": 8}, "splits=8 for a MatrixView"),
    ({"splits": "44"}, "got splits='44'"),
    ({"splits": None}, "got splits=None"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=str)
def test_views_of_no_parameter_are_refused_when_they_are_made(
    settings: dict[str, Any], message: str
) -> None:
    right = {"batch": 1, "rows": 8, "columns": 6}
    with pytest.raises(ValueError, match=message):
        MatrixView(**right | settings)
    if "rows" not in settings and "columns" not in settings:
        with pytest.raises(ValueError, match=rf"{next(iter(settings))}="):
            MatrixView.of((8, 6), **settings)


@pytest.mark.parametrize("splits", [(3, 3), (8, 8), (1, 1, 1), [4, 3]])
def test_splits_that_do_not_add_up_are_refused_before_a_step(splits: Sequence[int]) -> None:
    message = f"splits {re.escape(str(tuple(splits)))}, .* 8 "
    with pytest.raises(ValueError, match=message):
        MatrixView.of((8, 6), splits=splits)
    view = MatrixView(1, 8, 6, False, splits)
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [nn.Parameter(torch.ones(8, 6))], "views": [view]}])


def test_views_are_tuples_that_are_copied_and_compared() -> None:
    view = MatrixView(1, 8, 6, False, [4, 4])
    assert view == (1, 8, 6, False, (4, 4)) == pickle.loads(pickle.dumps(view))
    assert view._replace(splits=()) == MatrixView.of((8, 6)) == (*copy.deepcopy(view)[:4], ())
    assert repr(view) == "MatrixView(batch=1, rows=8, columns=6, transposed=False, splits=(4, 4))"
