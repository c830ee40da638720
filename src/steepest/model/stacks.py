"""Which queries, keys and values of neighbouring layers are taken together, as TEON does."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any, cast

from steepest.model.parameter_roles import RoleTable


def find_stacks(table: RoleTable, size: int) -> dict[str, list[int | None]]:
    """Return for each query, key and value the numbers of the stacks that its matrices are in.

    Those of one kind and shape in one list of layers, in its order, are taken `size` at a time.
    What is left over is in no stack.
    """
    lists = _lists([row.name for row in table.matrices if row.attention])
    kinds: dict[tuple[Any, ...], list[tuple[int, str, int]]] = defaultdict(list)
    for row in table.matrices:
        if row.name not in lists:
            continue
        family, layer = lists[row.name]
        sizes = cast(Any, row.view).sizes()
        for index, (kind, shape) in enumerate(zip(row.attention, sizes, strict=True)):
            kinds[family, kind, shape].append((layer, row.name, index))
    numbers: dict[str, list[int | None]] = {}
    count = 0
    for members in kinds.values():
        members.sort()
        for start in range(0, len(members) - size + 1, size):
            for _, name, index in members[start : start + size]:
                matrices = len(cast(Any, table[name].view).sizes())
                numbers.setdefault(name, [None] * matrices)[index] = count
            count += 1
    return numbers if size > 1 else {}


def _lists(names: list[str]) -> dict[str, tuple[str, int]]:
    """The list of layers that each parameter is in, and its number there.

    Of several numbers in a name the last one counts that tells it from another of these parameters:
    in `towers.0.blocks.1.attention.0.query` that of the block. Attention heads are no layers.
    """
    places: dict[str, list[tuple[str, int]]] = {}
    for name in names:
        numbers = re.finditer(r"(?<![^.])(?<!heads\.)\d+(?![^.])", name)
        places[name] = [(f"{name[: n.start()]}*{name[n.end() :]}", int(n[0])) for n in numbers]
    members = Counter(family for listed in places.values() for family, _ in listed)
    return {
        name: next((place for place in reversed(listed) if members[place[0]] > 1), listed[0])
        for name, listed in places.items()
        if listed
    }
