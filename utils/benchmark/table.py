"""Measured numbers as a table: for a terminal, for Markdown, for programs."""

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

_HEADING = 6
"""Characters that a heading may take on a terminal where its column is narrower."""


@dataclass(frozen=True)
class Spread:
    """What repeated measurements of one number gave."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def times(self, factor: float) -> "Spread":
        """The same in another unit."""
        return Spread(self.median * factor, self.lowest * factor, self.highest * factor)

    def under(self, amount: float) -> "Spread":
        """`amount` over each measurement: seconds become rates, and the slowest the lowest."""
        return Spread(amount / self.median, amount / self.highest, amount / self.lowest)


Cell = str | bool | int | float | Spread | None
Row = dict[str, Cell]


@dataclass
class Table:
    """Rows of cells by name; those that have no column are for programs alone."""

    title: str
    columns: dict[str, str]
    """A name to its heading."""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def text(self, width: int) -> str:
        """For a terminal of `width` characters: ranges below their medians, switches above their rows if too long."""
        names = self._shown()
        lines = self._grid(names)
        if "switches" in names and max(map(len, lines)) > width:
            lines = self._grid([name for name in names if name != "switches"], above="switches")
        return "\n".join([*textwrap.wrap(self.title, width), "", *lines, *self._notes(width)])

    def _shown(self) -> list[str]:
        """The columns that are not empty."""
        return [name for name in self.columns if any(row.get(name) not in (None, "") for row in self.rows)]

    def _grid(self, names: list[str], above: str = "") -> list[str]:
        """Lines of the headings and all rows, and where the cell `above` changes a line that says so."""
        blocks = [[_lines(row.get(name)) for name in names] for row in self.rows]
        narrow = [max([_HEADING, *(len(line) for block in blocks for line in block[n])]) for n in range(len(names))]
        blocks.insert(
            0, [textwrap.wrap(self.columns[name], w, break_long_words=False) for name, w in zip(names, narrow)]
        )
        widths = [max(len(line) for block in blocks for line in block[n]) for n in range(len(names))]
        sides = ["<" if all(isinstance(row.get(name), str) for row in self.rows) else ">" for name in names]
        lines: list[str] = []
        said = None
        for row, block in zip([{}, *self.rows], blocks):
            if row and above and row[above] != said:
                said = row[above]
                lines.append(f"{said or 'no switches'}:")
            for number in range(max(map(len, block))):
                cells = [cell[number] if number < len(cell) else "" for cell in block]
                lines.append("  ".join(f"{cell:{side}{w}}" for cell, side, w in zip(cells, sides, widths)).rstrip())
        return lines

    def markdown(self) -> str:
        """A Markdown table, ranges behind their medians, and the notes."""
        names = self._shown()
        lines = [f"| {' | '.join(self.columns[name] for name in names)} |", "| --- " * len(names) + "|"]
        for row in self.rows:
            cells = [_in_markdown(row.get(name)) for name in names]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, *([""] if self.notes else []), *(f"- {note}" for note in self.notes)]) + "\n"

    def numbers(self) -> dict[str, Any]:
        """The rows as JSON has them; a spread is `median`, `lowest`, `highest`."""
        rows = [
            {name: asdict(cell) if isinstance(cell, Spread) else cell for name, cell in row.items()}
            for row in self.rows
        ]
        return {"title": self.title, "rows": rows, "notes": self.notes}

    def _notes(self, width: int) -> list[str]:
        wrapped = [textwrap.wrap(note, width, initial_indent="- ", subsequent_indent="  ") for note in self.notes]
        return [line for lines in ([""], *wrapped) for line in lines] if wrapped else []


def _lines(cell: Cell) -> list[str]:
    if isinstance(cell, Spread):
        return [_figure(cell.median), _range(cell)]
    return [_word(cell)]


def _in_markdown(cell: Cell) -> str:
    if isinstance(cell, Spread):
        return f"{_figure(cell.median)} ({_range(cell)})"
    return f"`{cell}`" if isinstance(cell, str) and cell.startswith("-") else _word(cell)


def _word(cell: str | bool | int | float | None) -> str:
    return _figure(cell) if isinstance(cell, float) else "" if cell is None else str(cell)


def _range(spread: Spread) -> str:
    return f"{_figure(spread.lowest)}..{_figure(spread.highest)}"


def _figure(value: float) -> str:
    """At least three digits that count, and no more decimals than that takes."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
