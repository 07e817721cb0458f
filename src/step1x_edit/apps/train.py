"""``step1x train``: begin a training run, or go on with it."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from step1x_edit.apps.console import DONE, complain, following, one_line, quieten, working
from step1x_edit.errors import InvalidRequest, OutOfMemory, is_shortage

if TYPE_CHECKING:
    from step1x_edit.training.config import AnyRun
    from step1x_edit.training.log import StepReport
    from step1x_edit.training.loop import Watch

SIGNALLED = 128
"""Added to a signal's number: the exit code that shells give a program that it ended."""


def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="a run's YAML, see configs/train, or the official dataset TOML"
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="what to train, instead of the file's")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="the run's folder, instead of the file's"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="instead of the file's")
    ] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="print errors only")] = False,
) -> int:
    """Train as CONFIG says; the same command goes on where it was stopped or killed.

    Ctrl-C and SIGTERM save before they stop (exit code 130, 143). An official TOML trains a LoRA by
    the released recipe; it needs --output. On several processes: torchrun --nproc-per-node N
    $(which step1x) train CONFIG.
    """
    if "RANK" not in os.environ:  # of torchrun; without it a refusal need not import torch
        run = _read(config, model, output, steps)
        _look_at_model(run, quiet=quiet)
        return _train(run, quiet=quiet)
    from step1x_edit.training import ranks

    with ranks.joined():
        if not ranks.is_first():
            quiet = True
            logging.getLogger("step1x_edit").addHandler(logging.NullHandler())
        run = _read(config, model, output, steps)
        ranks.by_first(lambda: _look_at_model(run, quiet=quiet))
        return _train(run, quiet=quiet)


def _train(run: "AnyRun", *, quiet: bool) -> int:
    quieten()
    from step1x_edit.training.run import train as train_run

    with _shortage_named(), _notes_at_once(quiet=quiet), _followed(quiet=quiet) as watch:
        stopped = train_run(run, lambda what: working(what, quiet=quiet, steps=True), watch)
    if stopped is not None:
        if not quiet:
            typer.echo(f"{run.folder}  stopped and saved; the same command goes on")
        return SIGNALLED + stopped
    if not quiet:
        typer.echo(str(run.folder))
    return DONE


def _read(config: Path, model: str | None, output: Path | None, steps: int | None) -> "AnyRun":
    from step1x_edit.training.config import load, load_official

    if config.suffix != ".toml":
        return load(config, model=model, folder=output, num_steps=steps)
    if output is None:
        raise InvalidRequest(f"{config} says nothing of the result: give its folder with --output")
    return load_official(config, model=model, folder=output, num_steps=steps)


def _look_at_model(run: "AnyRun", *, quiet: bool) -> None:
    """Refuse or fetch the model of a run before torch is imported."""
    from step1x_edit.apps.checks import check_model
    from step1x_edit.apps.pull import ensure
    from step1x_edit.training.config import TuningRun

    if isinstance(run, TuningRun):
        check_model(run.model)
        say = (lambda _: None) if quiet else complain
        ensure(run.model, run.runtime(), say=say, quiet=quiet)


@contextmanager
def _followed(*, quiet: bool) -> "Iterator[Watch]":
    """A bar on a terminal; elsewhere the lines of the log."""
    on_terminal = sys.stderr.isatty()
    with following("training", quiet=quiet) as follow:

        def watch(report: "StepReport") -> None:
            words = f"loss {report.loss:.4f}  {report.samples_per_s:.2f} samples/s"
            follow(report.step, report.num_steps, words)
            if report.is_line and not on_terminal and not quiet:
                left = f"{report.seconds_left:.0f} s left"
                typer.echo(f"step {report.step} of {report.num_steps}  {words}  {left}")

        yield watch


@contextmanager
def _shortage_named() -> Iterator[None]:
    """Say where the memory ran out what takes less of it; the last checkpoint stands."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        raise OutOfMemory(
            "out of memory: give a smaller data.batch_size or data.size_level_px; "
            "`step1x doctor --train CONFIG` tells what the weights, offload and optimizer of a "
            "LoRA run take"
        ) from error


@contextmanager
def _notes_at_once(*, quiet: bool) -> Iterator[None]:
    """Print this package's warnings when they come: a run lasts for days."""
    logger = logging.getLogger("step1x_edit")
    handler = _Notes(logging.WARNING)
    if not quiet:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(f"note: {one_line(record.getMessage())}")
