"""Modules that moved are found at their old places for one version, with a warning."""

from __future__ import annotations

import importlib
import warnings

import pytest


@pytest.mark.parametrize("name", ["parameter_roles.RoleTable", "matrix_view.MatrixView"])
def test_old_places_of_names_warn_and_work(name: str) -> None:
    module, attribute = name.split(".")
    with pytest.warns(DeprecationWarning, match=f"steepest.model.{module}"):
        old = getattr(importlib.import_module(f"steepest.{module}"), attribute)
    with warnings.catch_warnings(action="error"):
        assert old is getattr(importlib.import_module(f"steepest.model.{module}"), attribute)


def test_a_name_that_no_place_has_is_refused() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Roles'"):
        exec("from steepest.parameter_roles import Roles")
