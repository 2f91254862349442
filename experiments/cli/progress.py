"""What the user sees while something runs."""

import sys
from typing import Any


class Progress:
    """A bar with the time left on a terminal; nothing elsewhere, except what the user should know.

    is_quiet: nothing at all, as in all processes of a run but the first.
    """

    def __init__(self, is_quiet: bool = False) -> None:
        from rich.console import Console

        self.console, self.is_quiet = Console(stderr=True, quiet=is_quiet), is_quiet
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, line: str) -> None:
        if self.console.is_terminal:
            self.console.print(line, highlight=False)

    def warn(self, line: str) -> None:
        if not self.is_quiet:
            print(f"rankwise: {line}", file=sys.stderr)

    def start(self, total: float) -> None:
        if not self.console.is_terminal or self.is_quiet:
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            "{task.description}",
            BarColumn(),
            "{task.percentage:>3.0f}%",
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(),
        )
        columns = [TextColumn(c) if isinstance(c, str) else c for c in columns]
        self.bar = Progress(*columns, console=self.console, speed_estimate_period=120)
        self.task = self.bar.add_task("", total=total)
        self.bar.start()

    def advance(self, what: str, rows: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=what, advance=rows)

    def more(self, rows: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, total=self.bar.tasks[self.task].total + rows)
