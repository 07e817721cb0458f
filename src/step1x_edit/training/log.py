"""What a run says while it goes on: a report a step, some of them lines of ``log.jsonl``."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from step1x_edit.files import write_text

logger = logging.getLogger(__name__)

LOG_NAME = "log.jsonl"


@dataclass(frozen=True)
class StepReport:
    """Where a run is after a step.

    Attributes:
        step: Steps done.
        num_steps: Steps in all.
        samples: Samples seen.
        loss: Mean since the last line of the log.
        grad_norm: Before clipping.
        lr: Learning rate of the next step.
        samples_per_s: Since the last line.
        seconds_left: At this process's mean speed.
        is_line: Whether the log has it.
    """

    step: int
    num_steps: int
    samples: int
    loss: float
    grad_norm: float
    lr: float
    samples_per_s: float
    seconds_left: float
    is_line: bool

    def line(self) -> dict[str, float]:
        """As the log has it."""
        return {
            "step": self.step,
            "samples": self.samples,
            "loss": round(self.loss, 5),
            "grad_norm": round(self.grad_norm, 3),
            "lr": self.lr,
            "samples_per_s": round(self.samples_per_s, 2),
        }


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    path = folder / LOG_NAME
    if not path.exists():
        return []
    # A kill may have cut the last line short.
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def append(folder: Path, line: dict[str, float]) -> None:
    """Add a line to a run's log; a log that cannot be written is not worth the run."""
    path = folder / LOG_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        logger.warning("%s could not be written (%s)", path, error.strerror)


def forget_after(folder: Path, step: int) -> None:
    """Drop the lines of steps that a kill has undone, and that are done again."""
    path = folder / LOG_NAME
    kept = [line for line in read_log(folder) if line["step"] <= step]
    text = "".join(f"{json.dumps(line)}\n" for line in kept)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        write_text(path, text)
