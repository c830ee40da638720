"""How far a step has come, for the error that ends it."""

from __future__ import annotations

from typing import Any

from steepest.optim.matrices import MatrixState
from steepest.optim.parameter_groups import name_of

_MOST_NAMES = 20


class Progress:
    """Which groups and, of the last one, parameters have moved so far."""

    def __init__(self, groups: list[dict[str, Any]]):
        self._groups = groups
        self._i = -1
        self._active: list[bool] = []
        self._done: list[MatrixState] = []
        self._now: list[MatrixState] = []
        self._size = (0, 0)

    def begin(self, i: int, active: list[bool]) -> None:
        """Group `i` takes its step; `active` is whether each of its matrices moves."""
        self._i, self._active, self._now = i, active, []
        self._done.clear()

    def enter(self, states: list[MatrixState], outputs: int, inputs: int) -> None:
        """Matrices `(outputs, inputs)` take their step; those before have taken it."""
        self._done += self._now
        self._now, self._size = states, (outputs, inputs)

    def explain(self, error: Exception) -> None:
        """Add to the error where the step has ended, and what has moved."""
        text = self._text()
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (f"{error.args[0].rstrip('.')}. {text}",)
        else:
            error.add_note(text)

    def _text(self) -> str:
        if self._i < 0:
            return "The step ended before anything moved: only memory of zeros was made"
        group = self._groups[self._i]
        place = f"in group {self._i} ({group['geometry']})"
        count = ""
        if self._now:
            place += f", at {len(self._now)} matrices of {self._size[0]} x {self._size[1]}"
            done = len(self._done)
            count = f"up to {done} of {sum(self._active)} matrices of this group have moved, "
        owners = [state.parameter for state in self._done]
        # What is not contiguous takes its step in a copy, which is written back in the end.
        moved = {id(p) for p in owners if p.is_contiguous()}
        names = [name_of(group, k) for k, p in enumerate(group["params"]) if id(p) in moved]
        shown = ", ".join(names[:_MOST_NAMES]) or "no parameter"
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        before = ", and all groups before it" if self._i else ""
        return (
            f"The step ended there, {place}: {count}that is {shown}{more}{before}; memory has "
            "taken in the gradients of what has moved and of these. Load the last checkpoint "
            "before another step"
        )
