"""What every command shares: progress bars, messages on one line, and exit codes."""

import errno
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from step1x_edit.errors import (
    CheckpointError,
    InvalidRequest,
    MissingExtra,
    Step1XEditError,
    is_shortage,
)

DONE, FAILED, BAD_REQUEST = 0, 1, 2
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Advance = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""
Follow = Callable[[int, int, str], None]
"""The same, and what to say beside the bar."""


def explain(error: Exception) -> tuple[str, int]:
    """What went wrong, on one line, and the exit code that says whose fault it was."""
    if isinstance(error, InvalidRequest | CheckpointError | MissingExtra):
        return one_line(error), BAD_REQUEST
    if isinstance(error, Step1XEditError):
        return one_line(error), FAILED
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f" for {error.filename}" if error.filename else ""
        return f"no room on the disk{where} ({error.strerror}): free some and try again", FAILED
    if isinstance(error, OSError):
        return one_line(error), FAILED
    if is_shortage(error):
        return "out of memory: give a smaller --size-level or --dtype bfloat16", FAILED
    kind = type(error).__name__
    return f"{kind}: {one_line(error)} (`step1x --debug …` shows where)", FAILED


def is_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C made this error: an import that it falls into may call itself a failed one."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, Step1XEditError):
        if isinstance(seen, KeyboardInterrupt):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def one_line(message: object) -> str:
    """The same words without line breaks."""
    return " ".join(str(message).split())


def complain(message: str) -> None:
    """Write one line to stderr."""
    typer.echo(f"step1x: {one_line(message)}", err=True)


@contextmanager
def notes_afterwards(*, quiet: bool) -> Iterator[None]:
    """Print what this package warns of, a line each, once all has gone well.

    A command that fails says why and nothing else; a quiet one says nothing.
    """
    logger = logging.getLogger("step1x_edit")
    notes = _Notes(logging.WARNING)
    logger.addHandler(notes)
    try:
        yield
    finally:
        logger.removeHandler(notes)
    for note in () if quiet else notes.said:
        complain(f"note: {note}")


class _Notes(logging.Handler):
    """Keeps messages, each once."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.said: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.said[one_line(record.getMessage())] = None


def quieten() -> None:
    """Keep the libraries' own chatter and bars out of the terminal; errors arrive as errors."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    warnings.simplefilter("ignore")


@contextmanager
def working(
    what: str, *, quiet: bool = False, steps: bool = False, sizes: bool = False
) -> Iterator[Advance]:
    """A bar on stderr while something goes on; nothing where stderr is no terminal.

    Args:
        what: Said beside the bar.
        quiet: Show nothing.
        steps: Steps will be counted.
        sizes: Bytes will be counted.

    Yields:
        A function that moves the bar.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich import progress  # a tenth of a second, which `--help` can do without
    from rich.console import Console

    columns: list[progress.ProgressColumn] = [
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
    ]
    if steps:
        columns += [progress.BarColumn(), progress.MofNCompleteColumn()]
    if sizes:
        columns += [
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        ]
    columns.append(progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


@contextmanager
def following(what: str, *, quiet: bool = False) -> Iterator[Follow]:
    """A bar on stderr for something long, with words of its own and the time left.

    Args:
        what: Said beside the bar.
        quiet: Show nothing.

    Yields:
        A function that moves the bar and changes the words.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich import progress
    from rich.console import Console

    columns = [
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[words]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    ]
    bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=None, words="")

    def follow(done: int, of: int, words: str) -> None:
        bar.start()  # not before, as other bars may come first
        bar.update(task, completed=done, total=of, words=words)

    try:
        yield follow
    finally:
        bar.stop()
