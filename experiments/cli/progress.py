"""What the user sees while something runs."""

import datetime
import json
import sys
import time
from typing import Any

from rankwise.experiments.cli.app import complain

SECONDS = 5.0  # from one progress line of --log-format json to the next


class Progress:
    """A bar with the time left on a terminal; nothing elsewhere, except what the user should know.

    log_format: "json" writes an object a line instead, for a program that watches: time, event ("say", "note", "progress"), and
        of progress what is running, the rows done and the rows there are.
    is_quiet: nothing at all, as in all processes of a run but the first.
    """

    def __init__(self, log_format: str = "text", is_quiet: bool = False) -> None:
        from rich.console import Console

        self.console, self.is_quiet = Console(stderr=True, quiet=is_quiet), is_quiet
        self.bar: Any = None
        self.as_json = log_format == "json" and not is_quiet
        self.what, self.done, self.total, self.said = "", 0.0, 0.0, float("-inf")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif self.as_json and self.total:
            self._progress()

    def say(self, line: str) -> None:
        if self.as_json:
            self._event("say", text=line)
        elif self.console.is_terminal:
            self.console.print(line, highlight=False)

    def warn(self, line: str) -> None:
        if self.is_quiet:
            return
        if self.as_json:
            self._event("note", text=line)
        else:
            complain(line)

    def start(self, total: float) -> None:
        self.total = total
        if self.as_json or self.is_quiet or not self.console.is_terminal:
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
        self.done += rows
        if self.bar is not None:
            self.bar.update(self.task, description=what, advance=rows)
        elif self.as_json and (what != self.what or time.monotonic() - self.said >= SECONDS):
            self.what = what
            self._progress()

    def more(self, rows: float) -> None:
        self.total += rows
        if self.bar is not None:
            self.bar.update(self.task, total=self.total)

    def _progress(self) -> None:
        self.said = time.monotonic()
        self._event("progress", what=self.what, done=round(self.done, 3), total=round(self.total, 3))

    def _event(self, event: str, **facts: Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        print(json.dumps({"time": now, "event": event, **facts}), file=sys.stderr, flush=True)
