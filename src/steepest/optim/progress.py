"""How far a step has come, for the error that ends it."""

from __future__ import annotations

from typing import Any

from steepest.optim.matrices import Batch
from steepest.optim.parameter_groups import name_of

_MOST_NAMES = 20


class Progress:
    """Which groups and, of the last one, parameters have moved so far."""

    def __init__(self, groups: list[dict[str, Any]]):
        self._groups = groups
        self._i = -1
        self._active: list[bool] = []
        self._done: list[Batch] = []
        self._batch: Batch | None = None

    def begin(self, i: int, active: list[bool]) -> None:
        """Group `i` takes its step; `active` is whether each of its matrices moves."""
        self._i, self._active, self._batch = i, active, None
        self._done.clear()

    def enter(self, batch: Batch) -> None:
        """A batch takes its step."""
        self._batch = batch

    def leave(self, batch: Batch) -> None:
        """A batch has taken its step."""
        self._done.append(batch)

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
        if self._batch is not None:
            batch = self._batch
            place += f", at {len(batch.G)} matrices of {batch.outputs} x {batch.inputs}"
            done = sum(len(batch.G) for batch in self._done)
            count = f"up to {done} of {sum(self._active)} matrices of this group have moved, "
        owners = [state.parameter for batch in self._done for state in batch.states]
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
