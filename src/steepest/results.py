"""How every result shows itself: a class writes `table`, and all other forms follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from rich import markup
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from steepest.files import write_json
from steepest.printing import as_text


class Column(NamedTuple):
    """One column of a result.

    Attributes:
        name: under which its values are exported.
        title: what stands above it; by default the name with spaces for underscores.
        form: format specification of its numbers, `.4g` by default.
        right: whether text in it stands to the right; numbers do in any case.
    """

    name: str
    title: str = ""
    form: str = ".4g"
    right: bool = False

    @property
    def heading(self) -> str:
        """What stands above the column."""
        return self.title or self.name.replace("_", " ")


class Result:
    """What is measured or decided; it prints in a terminal and a notebook, and exports.

    A subclass writes `table`; a dataclass among them is made with `repr=False`. It may replace any
    of the others, such as `as_dict` where it has more to say than its table.
    """

    width: ClassVar[int] = 120
    """Columns of the text."""

    def table(self) -> ResultTable:
        """Return what is to be shown."""
        raise NotImplementedError(f"{type(self).__name__} has no table; write the method `table`")

    def shown(self) -> Sequence[RenderableType]:
        """Return all that is shown, one below the other: the table."""
        return (self.table(),)

    def __rich__(self) -> RenderableType:
        return Group(*self.shown())

    def __str__(self) -> str:
        return as_text(self.__rich__(), self.width)

    def __repr__(self) -> str:
        return "\n".join(line.rstrip() for line in str(self).splitlines()).strip("\n")

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return "".join(
            part._repr_html_()
            if isinstance(part, ResultTable)
            else f"<pre>{escape(as_text(part, self.width))}</pre>"
            for part in self.shown()
        )

    @property
    def records(self) -> list[dict[str, Any]]:
        """The rows as dictionaries of plain values."""
        return self.table().records

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, which JSON has."""
        table = self.table()
        texts = {"title": table.title, "caption": table.caption}
        return {**{key: text for key, text in texts.items() if text}, "rows": self.records}

    def to_dataframe(self) -> Any:
        """Return a pandas data frame with the records.

        Raises:
            ModuleNotFoundError: without pandas, which `steepest` does not install by itself.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_dataframe needs pandas, which is not installed; install it with "
                "`pip install pandas` or `pip install 'steepest[dataframe]'`",
                name="pandas",
            ) from error
        return pandas.DataFrame(self.records)

    def save(self, path: str | Path) -> None:
        """Write `as_dict` as JSON with a checksum, whole or not at all."""
        write_json(path, self.as_dict())


@dataclass(frozen=True, repr=False)
class ResultTable(Result):
    """A table as plain values; `rich` and notebooks show it.

    Attributes:
        columns: a `Column` for each column.
        rows: the values of each row: numbers, strings, tuples, booleans, None where not known.
        title: above the table.
        caption: below the table.
        styles: for each row how `rich` shows it, such as "dim"; empty for no styles.

    >>> table = ResultTable.of([3 + 4j], ["real", Column("imag", "imaginary", ".2f")])
    >>> table.cells(), table.records
    ([['3', '4.00']], [{'real': 3.0, 'imag': 4.0}])
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    title: str = ""
    caption: str = ""
    styles: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        things: Iterable[Any],
        columns: Sequence[str | Column],
        title: str = "",
        caption: str = "",
    ) -> ResultTable:
        """Return a table with a row for each thing; columns are attributes of these things."""
        own = tuple(Column(column) if isinstance(column, str) else column for column in columns)
        rows = tuple(tuple(getattr(thing, column.name) for column in own) for thing in things)
        return cls(own, rows, title, caption)

    def table(self) -> ResultTable:
        """Return this table."""
        return self

    def cells(self) -> list[list[str]]:
        """Return the rows as text."""
        return [
            [_text(value, column.form) for value, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]

    @property
    def records(self) -> list[dict[str, Any]]:
        """A dictionary for each row."""
        names = [column.name for column in self.columns]
        return [dict(zip(names, row, strict=True)) for row in self.rows]

    def __rich__(self) -> RenderableType:
        if not self.columns:
            return Text(self.caption)
        table = Table(
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=markup.escape(self.title) or None,
            caption=markup.escape(self.caption) or None,
            caption_justify="left",
        )
        for i, column in enumerate(self.columns):
            right = column.right or _is_numeric([row[i] for row in self.rows])
            table.add_column(
                markup.escape(column.heading),
                justify="right" if right else "left",
                no_wrap=right,
                overflow="fold",
            )
        for i, cells in enumerate(self.cells()):
            table.add_row(*map(Text, cells), style=self.styles[i] if self.styles else None)
        return table

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        heads = "".join(f"<th>{escape(column.heading)}</th>" for column in self.columns)
        rows = (
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in self.cells()
        )
        title = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        caption = f"<p>{escape(self.caption)}</p>".replace("\n", "<br>") if self.caption else ""
        body = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
        return f"<table>{title}{body}</table>{caption}"


Entry = TypeVar("Entry", bound=Result)


class Results(Result, list[Entry]):
    """A list of results of one kind, which is one table with the rows of all."""

    def table(self) -> ResultTable:
        """Return the tables of its members as one."""
        tables = [member.table() for member in self]
        if not tables:
            return ResultTable((), (), caption="no rows")
        rows = tuple(row for table in tables for row in table.rows)
        return ResultTable(tables[0].columns, rows, tables[0].title, tables[0].caption)


def _is_numeric(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in known
    )


def _text(value: Any, form: str) -> str:
    """A cell as text: `-` for what is not known, numbers in a form, shapes as `8 x 4`.

    >>> [_text(v, ".2f") for v in (None, math.nan, 0.5, 12, True, (8, 4), (), ("a", "b"))]
    ['-', '-', '0.50', '12', 'yes', '8 x 4', 'scalar', 'a, b']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return format(value, form)
    if isinstance(value, tuple | list):
        if all(isinstance(part, int) for part in value):
            return " x ".join(map(str, value)) or "scalar"
        return ", ".join(_text(part, form) for part in value)
    return str(value)
