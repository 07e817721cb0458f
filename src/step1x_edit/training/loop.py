"""The one training loop: steps, log, checkpoints, clean stop. Every kind of run goes through it.

A run lives in a folder: ``checkpoints`` and ``log.jsonl`` (a line per report). SIGTERM or Ctrl-C
saves and stops; the same command goes on.
"""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from step1x_edit.errors import CheckpointError, Step1XEditError
from step1x_edit.training import ranks
from step1x_edit.training.checkpoint import Checkpoints
from step1x_edit.training.config import RunSettings
from step1x_edit.training.lanes import Lanes
from step1x_edit.training.log import StepReport, append, forget_after

logger = logging.getLogger(__name__)

Advance = Callable[[int, int], None]
"""Called with what is done and what there is in all."""
Stage = Callable[[str], AbstractContextManager[Advance]]
"""Shows what is going on before the first step."""


@dataclass
class TrainingRun:
    """What a run changes while it goes on.

    `trained` holds every module with parameters that are trained, under one name each; `ema` a
    moving average of these parameters. Frozen ones are nowhere in its checkpoints.
    """

    folder: Path
    trained: nn.ModuleDict
    optimizers: list[torch.optim.Optimizer]
    peak_lr: float
    num_steps: int
    warmup_steps: int = 100
    decay_share: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    decay: Literal["linear", "cosine"] = "linear"
    ema_decay: float | None = 0.998
    """None: no average is kept."""
    lr_scales: tuple[float, ...] = ()
    """Each optimiser's part of the learning rate; by default all of it."""
    keep_every: int | None = None
    """Steps between checkpoints that are never removed."""
    began_with: str = ""
    """Tells which weights are frozen beneath, or were there before the first step; may be empty."""
    step: int = 0
    saved_step: int | None = None
    """Of the newest checkpoint."""
    samples_seen: int = 0
    ema: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lr_scales = self.lr_scales or (1.0,) * len(self.optimizers)
        self._checkpoints = Checkpoints(self.folder, self.keep_every)
        self._parameters = {
            name: parameter
            for name, parameter in self.trained.named_parameters()
            if parameter.requires_grad
        }

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return self._parameters

    def learning_rate(self) -> float:
        """Warm-up, constant, and a decay to zero, linear (Hägele et al. 2024) or a half cosine."""
        decay_steps = max(1, round(self.decay_share * self.num_steps))
        warm = min(1.0, (self.step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        left = min(1.0, max(0.0, (self.num_steps - self.step) / decay_steps))
        if self.decay == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return self.peak_lr * warm * left

    def update_ema(self) -> None:
        """Move the average towards the weights, faster early on, so that the start is forgotten."""
        if self.ema_decay is None:
            return
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            if not self.ema:
                self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
            own: list[Tensor] = [self.parameters[name] for name in self.ema]
            torch._foreach_lerp_(list(self.ema.values()), own, 1 - decay)

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            OSError: The place cannot be written; the last checkpoint stands.
        """
        state = {
            "trained": {name: p.detach() for name, p in self.parameters.items()},
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            # Batch n is a function of the seed and n, so that this is the place in the data, too.
            "step": self.step,
            "samples_seen": self.samples_seen,
            "rng": torch.get_rng_state(),
            "began_with": self.began_with,
        }
        state = ranks.gathered(state)  # the same whatever the number of processes
        ranks.by_first(lambda: self._checkpoints.save(self.step, state))
        self.saved_step = self.step

    def restore(self) -> bool:
        """Read the newest whole checkpoint if there is one; True if there was.

        Raises:
            CheckpointError: It is another run's, or all are damaged.
        """
        saved = self._read()
        ranks.by_first(lambda: forget_after(self.folder, self.step))
        if saved is None:
            return False
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            settings = [dict(group, params=None) for group in optimizer.param_groups]
            optimizer.load_state_dict(ranks.parts_like(state, optimizer))
            for group, own in zip(optimizer.param_groups, settings, strict=True):
                # The state is the checkpoint's, the settings are this run's.
                group.update({name: value for name, value in own.items() if name != "params"})
        torch.set_rng_state(saved["rng"])
        return True

    def restore_weights(self) -> bool:
        """Read weights, average and counters of the checkpoint alone; True if there is one."""
        return self._read() is not None

    def _read(self) -> dict[str, Any] | None:
        saved = self._checkpoints.read_newest(mapped=ranks.world_size() > 1)
        if saved is None:
            return None
        began_with = saved.get("began_with") or self.began_with  # earlier versions say nothing
        if began_with != self.began_with:
            raise CheckpointError(
                f"{self.folder} holds a run over other weights ({began_with}, not "
                f"{self.began_with}): give another folder, or the model that it began with"
            )
        self._load_weights(saved["trained"])
        if self.ema_decay is not None:
            # Earlier versions averaged what was frozen, too.
            self.ema = {
                name: ranks.part_like(saved["ema"][name], parameter)
                for name, parameter in self.parameters.items()
                if name in saved["ema"]
            }
        self.step, self.samples_seen = saved["step"], saved["samples_seen"]
        self.saved_step = self.step
        return saved

    @torch.no_grad()
    def _load_weights(self, saved: dict[str, Tensor]) -> None:
        """Earlier versions saved what was frozen, too; it is taken back as well."""
        places = self.trained.state_dict(keep_vars=True)
        wrong = [
            name
            for name, parameter in self.parameters.items()
            if name not in saved or saved[name].shape != parameter.shape
        ]
        wrong += [name for name in saved if name not in places]
        if wrong:
            raise CheckpointError(
                f"{self.folder} holds the checkpoints of another run: {len(wrong)} of its tensors "
                f"do not fit (first {wrong[0]}): give another folder, or the settings it began with"
            )
        for name, tensor in saved.items():
            places[name].copy_(ranks.part_like(tensor, places[name]))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the averaged weights in the networks for a while, where an average is kept."""
        last = {name: self.parameters[name].detach().clone() for name in self.ema}
        self.load_ema_into(self.trained)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in last.items():
                    self.parameters[name].copy_(tensor)

    def load_ema_into(self, trained: nn.ModuleDict) -> None:
        """Copy the averaged weights into `trained`."""
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if name in self.ema:
                    parameter.copy_(self.ema[name])


@dataclass(frozen=True)
class Pace:
    """How often a run reports and saves.

    Attributes:
        report_every: Steps between log lines.
        save_every_s: Seconds between checkpoints.
        save_every: Steps between checkpoints; None leaves it to the clock.
        clip_norm: Limit of the gradient's norm.
    """

    report_every: int = 20
    save_every_s: float = 300
    save_every: int | None = None
    clip_norm: float = 1.0

    @classmethod
    def of(cls, settings: RunSettings) -> "Pace":
        """That of a run."""
        return cls(settings.report_every, settings.save_every_s, settings.save_every)


Watch = Callable[[StepReport], None]
"""Called after each step."""


def run_loop(
    run: TrainingRun,
    batches: Iterator[Any],
    loss_of: Callable[..., tuple[Tensor, int]],
    *,
    pace: Pace = Pace(),
    watch: Watch | None = None,
    lanes: Lanes | None = None,
) -> signal.Signals | None:
    """Train until `run.num_steps` or a signal.

    A checkpoint that cannot be written while training is a warning; the next one is tried in time.

    Args:
        run: The run; restored by the caller.
        batches: Endless batches; one with `names` is called by them in messages.
        loss_of: Batch → (loss, number of samples); of several processes each gives its part of the
            loss, which all together sum up to, and the samples of the whole batch.
        pace: How often to report and save.
        watch: Sees each step.
        lanes: Work on the parts of a batch (`rows`) side by side; `loss_of` is a `PartLoss` then.

    Returns:
        The signal that stopped the run; None when it is complete.

    Raises:
        Step1XEditError: The loss or its gradient is not finite, or the last checkpoint cannot be
            written. The one before stands.
    """
    stop = _StopSignal()
    work = lanes or _Whole()
    parameters = list(run.parameters.values())
    meter = _Meter(run, pace)
    saved_at = time.monotonic()
    with stop:
        while stop.agreed() is None and run.step < run.num_steps:
            batch = next(batches)
            value, count = work.gradient(loss_of, batch, parameters)
            _check_finite("loss", value, run.step, batch)
            norm = float(ranks.whole(nn.utils.clip_grad_norm_(parameters, pace.clip_norm)))
            _check_finite("norm of the gradient", norm, run.step, batch)
            for optimizer, scale in zip(run.optimizers, run.lr_scales, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = run.learning_rate() * scale
                work.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            run.step, run.samples_seen = run.step + 1, run.samples_seen + count
            run.update_ema()
            report = meter.after_step(value, norm, count)
            if report.is_line:
                if ranks.is_first():
                    append(run.folder, report.line())
                logger.info("%s", report.line())
            if watch is not None:
                watch(report)
            overdue = ranks.highest(time.monotonic() - saved_at > pace.save_every_s)
            wanted = any(
                every and run.step % every == 0 for every in (pace.save_every, run.keep_every)
            )
            if overdue or wanted:
                _save_or_warn(run)
                saved_at = time.monotonic()
        if run.step != run.saved_step:
            _save_at_the_end(run)
        return stop.agreed()


class _Whole:
    """Work on a batch in one go, as `Lanes` does on its parts; several processes each on theirs."""

    def gradient(
        self, loss_of: Callable[[Any], tuple[Tensor, int]], batch: Any, _: Sequence[nn.Parameter]
    ) -> tuple[float, int]:
        """Loss and number of samples; the gradient of a finite loss is left in the parameters."""
        loss, count = loss_of(batch)
        value = ranks.summed(loss.item())
        if math.isfinite(value):
            # Spread gradients are the mean over the processes.
            (loss * ranks.world_size()).backward()
        return value, count

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()


class _Meter:
    """Means and speeds between the lines of the log."""

    def __init__(self, run: TrainingRun, pace: Pace) -> None:
        self.run, self.pace = run, pace
        self.first_step = run.step
        self.started = self.reported = time.monotonic()
        self.losses: list[float] = []
        self.samples = 0

    def after_step(self, loss: float, norm: float, samples: int) -> StepReport:
        run, now = self.run, time.monotonic()
        self.losses.append(loss)
        self.samples += samples
        seconds_per_step = (now - self.started) / (run.step - self.first_step)
        report = StepReport(
            run.step,
            run.num_steps,
            run.samples_seen,
            sum(self.losses) / len(self.losses),
            norm,
            run.learning_rate(),
            self.samples / max(now - self.reported, 1e-9),
            seconds_per_step * (run.num_steps - run.step),
            run.step % self.pace.report_every == 0,
        )
        if report.is_line:
            self.losses, self.samples, self.reported = [], 0, now
        return report


def _check_finite(what: str, value: float, step: int, batch: Any) -> None:
    if not math.isfinite(value):
        names = ", ".join(getattr(batch, "names", ())) or f"number {step}"
        raise Step1XEditError(
            f"{what} {value} at step {step}, in the batch of {names}: look at these examples, or "
            "lower the learning rate; the last checkpoint stands"
        )


def _save_or_warn(run: TrainingRun) -> None:
    try:
        run.save()
    except OSError as error:
        logger.warning(
            "no checkpoint of step %d could be written (%s): the one before stands, training goes "
            "on; free some room",
            run.step,
            error.strerror,
        )


def _save_at_the_end(run: TrainingRun) -> None:
    try:
        run.save()
    except OSError as error:
        raise Step1XEditError(
            f"the checkpoint of step {run.step} could not be written to {run.folder} "
            f"({error.strerror}): the one before stands; free some room and give the same command "
            "again"
        ) from error


class _StopSignal:
    """Turns SIGTERM and SIGINT into a request to stop after the step at hand."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> signal.Signals | None:
        """What any process has received; all of them ask together."""
        number = ranks.highest(self.received or 0)
        return signal.Signals(int(number)) if number else None

    def _request(self, number: int, _: object) -> None:
        self.received = signal.Signals(number)
