"""A table, and how it is written as Markdown, CSV, LaTeX (booktabs) and plain text.

The renderers know nothing of runs: a table is columns, rows of cells (cells.py), and the sentences that go with them.
"""

import csv
import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass

from rankwise.reports.tables.cells import Cell, cell_text
from rankwise.variants.settings import printable

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?inf"
# A number, several with semicolons between, an interval, a difference with its interval, and shares in percent.
OF_NUMBERS = re.compile(rf"(?:{NUMBER})(?:;(?:{NUMBER})| to (?:{NUMBER})| \((?:{NUMBER})| %|\))*")


@dataclass(frozen=True)
class Table:
    """Columns, rows and caption, written in several formats."""

    name: str  # of its files
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: tuple[str, ...]
    text_columns: int = 1  # the first columns hold text, the others numbers; "status" is text too
    reproduce: str = ""  # how its numbers can be made again, in one line
    keys: int = 1  # the first columns name a row: on a terminal each block of columns has them again
    is_quoted: bool = False  # its cells are texts of others, in which "+-" is no plus-minus and a hyphen no minus

    def cells(self) -> list[list[str]]:
        return [[cell_text(cell) for cell in row] for row in self.rows]

    def is_text(self, column: int) -> bool:
        return column < self.text_columns or self.columns[column] == "status"

    def markdown(self) -> str:
        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        head = line(map(escape_markdown, self.columns))
        rule = line(":--" if self.is_text(i) else "--:" for i in range(len(self.columns)))
        cells = [[escape_markdown(cell) for cell in row] for row in self.cells()]
        body = [line(row if self.is_quoted else (cell.replace("+-", "&plusmn;") for cell in row)) for row in cells]
        return "\n".join([head, rule, *body]) + "\n"

    def records(self) -> list[dict[str, str | int | float | None]]:
        """Full precision, one value a key: "time" becomes "time each" and "time pack sizes"."""
        columns: dict[str, list] = {}
        for i, title in enumerate(self.columns):
            cells = [row[i] for row in self.rows]
            kind = next((type(cell) for cell in cells if is_dataclass(cell)), None)
            if kind is None:
                columns[title] = cells
                continue
            for name in (field.name for field in fields(kind) if field.name != "show"):
                columns[f"{title} {name.replace('_', ' ')}"] = [_plain(getattr(cell, name, cell)) for cell in cells]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def csv(self) -> str:
        rows = self.records()
        return csv_text(list(rows[0]) if rows else self.columns, [list(row.values()) for row in rows])

    def latex(self) -> str:
        spec = "".join("l" if self.is_text(i) else "r" for i in range(len(self.columns)))

        def line(cells: Iterable[str]) -> str:
            return " & ".join(cells) + r" \\"

        caption = " ".join(escape_latex(sentence) for sentence in (self.title + ".", *self.caption))
        return "\n".join(
            [
                r"% \usepackage{booktabs}",
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{caption}}}",
                rf"\label{{tab:{self.name}}}",
                rf"\begin{{tabular}}{{{spec}}}",
                r"\toprule",
                line(map(escape_latex, self.columns)),
                r"\midrule",
                *(line(map(escape_latex, row)) for row in self.cells()),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def text(self, width: int = 100) -> str:
        """For a terminal: blocks of columns that fit, each with the columns that name a row, then the caption."""
        cells = [list(self.columns), *([printable(cell) for cell in row] for row in self.cells())]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]

        def line(row: Sequence[str], block: Sequence[int]) -> str:
            parts = (row[i].ljust(widths[i]) if self.is_text(i) else row[i].rjust(widths[i]) for i in block)
            return "  ".join(parts).rstrip()

        out = [*textwrap.wrap(printable(self.title), width), ""]
        for block in _blocks(widths, width, self.keys):
            rule = "  ".join("-" * widths[i] for i in block)
            out += [line(cells[0], block), rule, *(line(row, block) for row in cells[1:]), ""]
        for sentence in self.caption:
            out += textwrap.wrap(printable(sentence), width, initial_indent="- ", subsequent_indent="  ")
        return "\n".join(out).rstrip() + "\n"


def _blocks(widths: list[int], width: int, keys: int) -> list[list[int]]:
    first = list(range(keys))
    blocks = [list(first)]
    for i in range(keys, len(widths)):
        used = sum(widths[at] + 2 for at in blocks[-1])
        if used + widths[i] > width and len(blocks[-1]) > keys:
            blocks.append(list(first))
        blocks[-1].append(i)
    return blocks


def _plain(value: object) -> object:
    """A tuple of one value as that value, a longer one as text with semicolons."""
    if not isinstance(value, tuple):
        return value
    return value[0] if len(value) == 1 else ";".join(map(str, value))


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A CSV for people and for programs: numbers in full precision, and no name of a user's that a spreadsheet would compute.

    A spreadsheet takes a cell that begins with =, +, -, @, a tab or a return for a formula; an apostrophe before it makes it
    text (OWASP, "CSV Injection").  Numbers and intervals of numbers stay as they are.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([_no_formula(cell) for cell in row] for row in ([columns, *rows] if columns else []))
    return out.getvalue()


def _no_formula(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    is_safe = not cell.startswith(("=", "+", "-", "@", "\t", "\r")) or cell == "-" or OF_NUMBERS.fullmatch(cell)
    return (cell if is_safe else f"'{cell}").replace("\r", " ")  # which Python's csv leaves without quotes before 3.13


def escape_markdown(text: str) -> str:
    for char, code in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "\\|"),
        ("*", "\\*"),
        ("_", "\\_"),
        ("`", "\\`"),
        ("](", "]\\("),
        ("\n", " "),
    ):
        text = text.replace(char, code)
    return text


def escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " "}
    special |= {char: "\\" + char for char in "&%$#_{}"}
    out = "".join(special.get(char, char) for char in text).replace("+-", r"$\pm$")
    return out.replace("<", "$<$").replace(">", "$>$")
