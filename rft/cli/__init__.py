"""The `rft` command. Prints results and one clear message per error; exit codes: 1 world, 2 user, 130 interrupted.

The commands are in the modules beside this one, by what they are for; each imports what it needs when it is called.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console

from rft.cli import cluster, grading, looking, measuring, offline, planning, serving, training
from rft.errors import RftError, StorageError, UserError
from rft.files import replace

_INTERRUPTED = 130
_HELP = "Train an agent's model on its own tools and graders."

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=_HELP)
for commands in (training, planning, measuring, looking, serving, cluster, offline):
    app.add_typer(commands.app)
app.add_typer(grading.app, name="grade")


@app.callback()
def _root() -> None:
    """Train an agent's model on its own tools and graders."""


def main() -> None:
    """Run the CLI; every expected failure becomes one message and an exit code, never a traceback."""
    ending = os.environ.pop("RFT_ENDING", None)
    _end_on_sigterm()
    signal.signal(signal.SIGUSR1, lambda *_: None)  # asks a run what it is doing (rft/watch.py); must never end one
    try:
        code = app(standalone_mode=False)  # typer returns the code of an exit, 130 for a Ctrl-C
    except RftError as error:
        _tell_ending(ending, error)
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = f"the disk is full: {error.filename or os.getcwd()}\n  cure: free space, then --resume"
        _tell_ending(ending, StorageError(text))
        _fail(text, 1)
    except Exception as error:  # click's usage errors, which are not public through typer
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), 2)
    if code == _INTERRUPTED:
        _fail("interrupted; nothing written is lost: train, sample, eval and baseline continue with --resume", code)
    sys.exit(code or 0)


def _end_on_sigterm() -> None:
    """End as a Ctrl-C does, which the event loop turns into a cancellation; also where SIGINT is ignored (`rft &`)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    else:
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def _fail(text: str, code: int) -> NoReturn:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {text}", style="red", markup=False)
    sys.exit(code)


def _tell_ending(path: str | None, error: RftError) -> None:
    """Write the error where RFT_ENDING says: launchers between us and who started us lose exit codes."""
    if path is not None:
        where = error.where if isinstance(error, UserError) else ""
        told = {"kind": type(error).__name__, "where": where, "error": str(error)}
        with contextlib.suppress(StorageError):  # then whoever started us sees an end without a reason
            replace(Path(path), json.dumps(told).encode())
