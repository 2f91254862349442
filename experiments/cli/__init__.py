"""The command, one file for each of its words.  Results go to standard output, everything else to standard error.

Exit codes: 0 all completed, 1 some run failed, 2 the user can mend it (one clear line for each fault), 130 interrupted.
Settings are checked before torch is imported, so that help and refusals answer within a second.  Only this package imports
experiments, variants and reports together.
"""

import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import typer
from pydantic import ValidationError
from rankwise.experiments.cli.analysis import analysis
from rankwise.experiments.cli.app import app, complain, place_of
from rankwise.experiments.cli.bench import bench
from rankwise.experiments.cli.calibration import calibration
from rankwise.experiments.cli.compare import compare
from rankwise.experiments.cli.data import data
from rankwise.experiments.cli.doctor import doctor
from rankwise.experiments.cli.export import export
from rankwise.experiments.cli.generate import generate
from rankwise.experiments.cli.listing import list_
from rankwise.experiments.cli.options import with_values
from rankwise.experiments.cli.paper import paper
from rankwise.experiments.cli.plan import plan
from rankwise.experiments.cli.ranks import ranks
from rankwise.experiments.cli.report import report
from rankwise.experiments.cli.start import torchrun
from rankwise.experiments.cli.suggest import suggest
from rankwise.experiments.cli.tune import tune

# In the order of `rankwise --help`.
for command in (compare, plan, suggest, tune, report, data, paper, ranks, doctor, export, generate, bench, calibration):
    app.command()(command)
app.add_typer(analysis, name="analysis")
app.command(name="list")(list_)


def main(words: Sequence[str] | None = None) -> None:
    """Entry point: turns what a user can mend into one line and an exit code."""
    try:
        given = with_values(sys.argv[1:] if words is None else words)
        code = app(given, standalone_mode=False)  # typer returns the code of an Exit, and 130 for an interrupt
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on where this one stopped")
        sys.exit(130)
    except BrokenPipeError:  # the program that read our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (typer.Abort, EOFError):
        sys.exit(130)
    except ValueError as error:
        complain(str(error))
        sys.exit(2)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            complain(
                f"the disk is full{place_of(error)}: free some space and give the same command again; nothing done is lost"
            )
        else:
            complain(str(error) if error.errno is None else f"{error.strerror}{place_of(error)}")
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own usage errors
            if torchrun()[0] == 0:
                complain(usage(error))
            sys.exit(2)
        raise


def usage(error: Any) -> str:
    """What is wrong with the words of a command line."""
    if isinstance(error.__cause__, ValidationError):  # typer since 0.29 converts with pydantic and leaves out the value
        fault = error.__cause__.errors()[0]
        return f"{error.param.opts[0]} {fault['input']}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
    before = re.fullmatch(r"'(?P<value>.*)' (?P<fault>is not .*?)\.?", getattr(error, "message", "") or "")
    if before is not None and getattr(error, "param", None) is not None:
        return f"{error.param.opts[0]} {before['value']}: {before['fault']}"
    return error.format_message()
