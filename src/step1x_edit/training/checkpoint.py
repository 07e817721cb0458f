"""The checkpoints of a training run: written whole or not at all, checked when they are read.

One file a checkpoint, ``checkpoints/step_00000200.pt``, the same for every kind of run. Its archive
holds a check sum of each tensor; a file that fails it is passed over for the one before. Called by
`loop.TrainingRun`.
"""

import logging
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from step1x_edit.errors import CheckpointError, InvalidRequest

logger = logging.getLogger(__name__)

NUM_KEPT = 2
"""Of the newest, beside those that are kept for good."""
OLD_NAME = "checkpoint.pt"
"""The only checkpoint of runs by earlier versions, in the run's folder itself."""
UNFINISHED = ".new"


@contextmanager
def alone(run_folder: Path) -> Iterator[None]:
    """Make a run's folder, and keep other processes from training in it.

    Raises:
        InvalidRequest: One does.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise InvalidRequest(
            f"{run_folder}: another process is training there: wait for it, or give another folder"
        ) from error


class Checkpoints:
    """What is kept of a run.

    Args:
        run_folder: The run's folder.
        keep_every: Steps between checkpoints that are kept for good; None keeps the newest alone.
    """

    def __init__(self, run_folder: Path, keep_every: int | None = None) -> None:
        self.run_folder, self.keep_every = run_folder, keep_every
        self.folder = run_folder / "checkpoints"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint beside its place, rename it, and remove what it takes the place of.

        Those are older ones, and later ones, which were damaged if the run went on from before.

        Raises:
            OSError: The place cannot be written; what stood there stands.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        target = self.folder / f"step_{step:08d}.pt"
        beside = target.with_name(target.name + UNFINISHED)
        try:
            with beside.open("wb") as file:
                _write(state, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        self._remove_others(target)
        return target

    def read_newest(self, *, mapped: bool = False) -> dict[str, Any] | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Args:
            mapped: Leave the tensors in the file until they are used: several processes that each
                take a part would not fit it into memory as often as they are.

        Raises:
            CheckpointError: There are some, and all are damaged.
        """
        paths = [*reversed(self._all()), self.run_folder / OLD_NAME]
        paths = [path for path in paths if path.exists()]
        for path in paths:
            try:
                return _read(path, mapped)
            except (OSError, RuntimeError, EOFError, KeyError, ValueError,
                    zipfile.BadZipFile, pickle.UnpicklingError) as error:  # fmt: skip
                what = " ".join(str(error).split())
                logger.warning("%s is damaged (%s): going on from the one before", path, what)
        if paths:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole: remove the folder to begin anew"
            )
        return None

    def _remove_unfinished(self) -> None:
        """Clean up after a run that was killed while it saved."""
        for folder in (self.folder, self.run_folder):
            for path in folder.glob(f"*.pt{UNFINISHED}"):
                path.unlink(missing_ok=True)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.pt"))

    def _remove_others(self, newest: Path) -> None:
        paths = self._all()
        place = paths.index(newest)
        for path in paths[place + 1 :]:
            path.unlink()
        for path in paths[: max(0, place + 1 - NUM_KEPT)]:
            step = int(path.stem.removeprefix("step_"))
            if not self.keep_every or step % self.keep_every:
                path.unlink()


def _write(state: dict[str, Any], file: Any) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # Torch's writer fails once more while it closes what the full disk has cut short.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _read(path: Path, mapped: bool) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()  # torch does not look at the check sums
    if broken is not None:
        raise ValueError(f"{broken} fails its check sum")
    return torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
