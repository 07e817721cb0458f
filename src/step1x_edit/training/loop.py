"""The one training loop: steps, log, checkpoints, clean stop.

The autoencoder and the editor run through it.
A run lives in a folder: ``checkpoint.pt`` (model, EMA, optimiser, step, random state; written
beside and renamed) and ``log.jsonl`` (a line per report). SIGTERM or Ctrl-C saves and stops; the
same command goes on.
"""

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from step1x_edit.errors import Step1XEditError

logger = logging.getLogger(__name__)


@dataclass
class TrainingRun:
    """What a run changes while it goes on.

    `trained` holds every module whose parameters are trained, under one name each; `ema` a moving
    average of it.
    """

    folder: Path
    trained: nn.ModuleDict
    optimizers: list[torch.optim.Optimizer]
    peak_lr: float
    num_steps: int
    warmup_steps: int = 100
    decay_share: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    ema_decay: float = 0.998
    lr_scales: tuple[float, ...] = ()
    """Each optimiser's part of the learning rate; by default all of it."""
    step: int = 0
    samples_seen: int = 0
    ema: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lr_scales = self.lr_scales or (1.0,) * len(self.optimizers)

    def learning_rate(self) -> float:
        """Warm-up, constant, linear decay to zero (Hägele et al. 2024)."""
        decay_steps = max(1, round(self.decay_share * self.num_steps))
        warm = min(1.0, (self.step + 1) / self.warmup_steps)
        return self.peak_lr * warm * min(1.0, max(0.0, (self.num_steps - self.step) / decay_steps))

    def update_ema(self) -> None:
        """Move the average towards the weights, faster early on, so that the start is forgotten."""
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            named = dict(self.trained.named_parameters())
            if not self.ema:
                self.ema = {name: p.detach().clone() for name, p in named.items()}
            torch._foreach_lerp_(list(self.ema.values()), [named[n] for n in self.ema], 1 - decay)

    def save(self) -> None:
        """Write the checkpoint beside its place, then rename it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / "checkpoint.pt"
        beside = target.with_suffix(".pt.new")
        torch.save(
            {
                "trained": self.trained.state_dict(),
                "ema": self.ema,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "samples_seen": self.samples_seen,
                "rng": torch.get_rng_state(),
            },
            beside,
        )
        beside.replace(target)

    def restore(self) -> bool:
        """Read the checkpoint if there is one; True if there was."""
        saved = self._read()
        if saved is None:
            return False
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            settings = [dict(group, params=None) for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, own in zip(optimizer.param_groups, settings, strict=True):
                # The state is the checkpoint's, the settings are this run's.
                group.update({name: value for name, value in own.items() if name != "params"})
        torch.set_rng_state(saved["rng"])
        return True

    def restore_weights(self) -> bool:
        """Read weights, average and counters of the checkpoint alone; True if there is one."""
        return self._read() is not None

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        saved = torch.load(path, weights_only=True)
        self.trained.load_state_dict(saved["trained"])
        self.ema = saved["ema"]
        self.step, self.samples_seen = saved["step"], saved["samples_seen"]
        return saved

    def load_ema_into(self, trained: nn.ModuleDict) -> None:
        """Copy the averaged weights into `trained`."""
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                parameter.copy_(self.ema[name])


def run_loop(
    run: TrainingRun,
    batches: Iterator[Any],
    loss_of: Callable[[Any], tuple[torch.Tensor, int]],
    *,
    report_every: int = 20,
    save_every_s: float = 300,
    clip_norm: float = 1.0,
) -> bool:
    """Train until `run.num_steps` or a signal.

    Args:
        run: The run; restored by the caller.
        batches: Endless batches.
        loss_of: Batch → (loss, number of samples).
        report_every: Steps between log lines.
        save_every_s: Seconds between checkpoints.
        clip_norm: Limit of the gradient's norm.

    Returns:
        True when the run is complete, False when a signal stopped it.

    Raises:
        Step1XEditError: The loss is not finite. The last checkpoint stands.
    """
    stop = _StopSignal()
    parameters = [p for p in run.trained.parameters() if p.requires_grad]
    saved_at = reported_at = time.monotonic()
    losses: list[float] = []
    samples = 0
    with stop:
        while run.step < run.num_steps and not stop.requested:
            loss, count = loss_of(next(batches))
            if not math.isfinite(loss.item()):
                raise Step1XEditError(
                    f"loss {loss.item()} at step {run.step}: lower the learning rate and go on"
                )
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
            for optimizer, scale in zip(run.optimizers, run.lr_scales, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = run.learning_rate() * scale
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            run.step, run.samples_seen, samples = (
                run.step + 1,
                run.samples_seen + count,
                samples + count,
            )
            run.update_ema()
            losses.append(loss.item())
            now = time.monotonic()
            if run.step % report_every == 0:
                line = {
                    "step": run.step,
                    "samples": run.samples_seen,
                    "loss": round(sum(losses) / len(losses), 5),
                    "grad_norm": round(float(norm), 3),
                    "lr": run.learning_rate(),
                    "samples_per_s": round(samples / (now - reported_at), 2),
                }
                _append(run.folder / "log.jsonl", line)
                logger.info("%s", line)
                losses, samples, reported_at = [], 0, now
            if now - saved_at > save_every_s:
                run.save()
                saved_at = now
    run.save()
    return run.step >= run.num_steps


class _StopSignal:
    """Turns SIGTERM and SIGINT into a request to stop after the step at hand."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        self.requested = True


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
