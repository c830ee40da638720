"""What the command line shows fits a terminal."""

from __future__ import annotations

import pytest

from steepest.printing import as_text
from steepest.transfer.consistency import SizeCurve, SuperConsistency


@pytest.mark.parametrize("size", [{"width": 32}, {"width": 1024, "depth": 16, "heads": 128}])
def test_no_number_of_the_sharpness_is_cut_at_80_columns(size: dict[str, int]) -> None:
    steps, small = tuple(range(100, 2500, 100)), (0.0000148,) * 24
    row = SizeCurve(size, steps, small, small, small[:2], small[:2])
    found = SuperConsistency(
        "mup", "adam", 0.01, "one step", "width", (32.0, 64.0), (row, row), 1.0, 1.0, 0.0, None
    )
    shown = as_text(found.table(), 80)
    assert "…" not in shown
    assert shown.count("1.48e-05") == 2 * 7
