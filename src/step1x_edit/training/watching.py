"""What shows how a run goes: TensorBoard's files, and pictures made again and again.

Called by `tuning`.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from step1x_edit import images
from step1x_edit.errors import OutOfMemory, Step1XEditError, is_shortage
from step1x_edit.request import EditRequest
from step1x_edit.training import ranks
from step1x_edit.training.config import TuningRun
from step1x_edit.training.log import StepReport
from step1x_edit.training.loop import TrainingRun, Watch
from step1x_edit.training.report import write_page

if TYPE_CHECKING:
    from step1x_edit.training.tuning import Tuning

logger = logging.getLogger(__name__)


class TensorBoard:
    """Writes loss, gradient norm, learning rate and speed to ``tensorboard`` in the run's folder.

    Args:
        config: The run's settings.
        step: Done so far; what was written of later ones is void.
    """

    def __init__(self, config: TuningRun, step: int) -> None:
        self._writer: Any = None
        if config.tensorboard and ranks.is_first() and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            folder = config.folder / "tensorboard"
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def after_step(self, report: StepReport) -> None:
        """Write the lines that the log has."""
        if self._writer is not None and report.is_line:
            for name, value in report.line().items():
                if name != "step":
                    self._writer.add_scalar(name, value, report.step)


class Samples:
    """Makes the same pictures every so many steps, by the editor itself, and a page of them.

    Args:
        config: The run's settings.
        tuning: The model.
        run: How far it is; pictures are made with its averaged weights, where it has them.
        requests: From `requests`.
    """

    def __init__(
        self, config: TuningRun, tuning: Tuning, run: TrainingRun, requests: list[EditRequest]
    ) -> None:
        self.config, self.tuning, self.run, self.made_of = config, tuning, run, requests

    @staticmethod
    def requests(config: TuningRun) -> list[EditRequest]:
        """What the samples ask for.

        Raises:
            InvalidRequest: One cannot be made.
        """
        found = []
        for sample in config.samples:
            if sample.image is not None:
                images.open_picture(sample.image)
            found.append(EditRequest.checked(**sample.model_dump()))
        return found

    def after_step(self, report: StepReport) -> None:
        """Make the pictures where it is time."""
        if report.step % self.config.sample_every and report.step < report.num_steps:
            return
        with self.run.averaged(), self.tuning.frozen_networks():
            # Several processes edit together, and the first one saves.
            results = [self.tuning.editor.edit(request) for request in self.made_of]
        if ranks.is_first():
            folder = self.config.folder / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            for number, result in enumerate(results):
                result.save([folder / f"{number:02d}_step_{report.step:08d}.png"])
            write_page(self.config.folder, self.config.samples)


def all_of(watchers: list[Watch | None]) -> Watch:
    """One after the other; a fault of one is a warning where steps can go on after it."""

    def watch(report: StepReport) -> None:
        for each in watchers:
            try:
                if each is not None:
                    each(report)
            except (OSError, MemoryError, RuntimeError, Step1XEditError) as error:
                if not _spares_the_run(error):
                    raise
                logger.warning("after step %d: %s", report.step, error)

    return watch


def _spares_the_run(error: Exception) -> bool:
    """Whether steps can go on after it: a full disk, mostly, or no memory for samples."""
    if isinstance(error, OutOfMemory) or is_shortage(error):
        # Of several processes the others would wait for the one that has left their sample.
        return ranks.world_size() == 1
    return isinstance(error, OSError | Step1XEditError)
