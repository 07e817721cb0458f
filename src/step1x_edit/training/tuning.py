"""LoRA and full runs over a finished model: released, converted, or the mini.

Autoencoder and language model are frozen: what they say of the data is made once and kept, after
which they leave the device. What the transformer reads while training is what the pipeline gives it
while editing, by the release at hand: same tokens, same ids, same time in [0, 1].
"""

import gc
import logging
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from step1x_edit.errors import InvalidRequest
from step1x_edit.model.guidance import prepare_ids, resolution_shift
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.request import EditRequest
from step1x_edit.runtime.heap import give_back
from step1x_edit.runtime.precision import StoredLinear
from step1x_edit.training import lora, pairs, ranks
from step1x_edit.training.checkpoint import alone
from step1x_edit.training.config import FullRun, LoraRun, TuningRun
from step1x_edit.training.feature_batch import FeatureBatch
from step1x_edit.training.feature_batches import feature_batches
from step1x_edit.training.log import StepReport
from step1x_edit.training.loop import (
    Advance,
    Pace,
    Stage,
    TrainingRun,
    Watch,
    run_loop,
)
from step1x_edit.training.objective import add_noise, draw_examples, token_weights, velocity_loss
from step1x_edit.training.optimizers import build_optimizer, check_optimizer
from step1x_edit.training.placing import Opened, open_model
from step1x_edit.training.report import Card, write_card
from step1x_edit.training.watching import Samples, TensorBoard, all_of

logger = logging.getLogger(__name__)


class Tuning:
    """The model of a run, with what is trained in it, and the loss of a batch.

    Args:
        config: The run's settings.
        opened: From `open_model`, which is called by default.

    Raises:
        InvalidRequest: The model or a layer is unknown, or its weights cannot be trained.
        CheckpointError: The model's files are not what they should be.
    """

    def __init__(self, config: TuningRun, opened: Opened | None = None) -> None:
        self.config = config
        self.editor, self.bring_transformer = opened or open_model(config)
        self.pipeline: Step1XEditPipeline = self.editor.pipeline
        self.transformer: Any = self.pipeline.transformer
        self.device: torch.device = self.transformer.device
        self.dtype: torch.dtype = self.transformer.dtype
        self._waiting_place = self.device
        for frozen in (self.pipeline.text_encoder, self.pipeline.vae):
            frozen.requires_grad_(False)
        if isinstance(config, LoraRun):
            lora.put_on(self.transformer, config)
            ranks.spread(self.transformer, self.device)
        else:
            _make_trainable(self.transformer, config)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.trained = nn.ModuleDict({"transformer": self.transformer})

    def loss_of(self, batch: FeatureBatch, step: int) -> Float[Tensor, ""]:
        """The flow-matching loss of a batch, times the share of the whole batch that it is.

        Args:
            batch: From the data.
            step: Decides noise and times, with the run's seed.

        Raises:
            InvalidRequest: Changed tokens should weigh more, and the data do not say which they
                are.
        """
        clean = batch.target.float()
        generators = [
            example_generator(self.config.seed, step, batch.first + row)
            for row in range(len(clean))
        ]
        noise, times = draw_examples(clean.shape, self._shift(batch), generators)
        noisy, clean, noise, times = (
            part.to(self.device) for part in (add_noise(clean, noise, times), clean, noise, times)
        )
        predicted = self._predict(batch, noisy, times)
        return velocity_loss(predicted, clean, noise, self._weights(batch)) * batch.share

    def _predict(self, batch: FeatureBatch, noisy: Tensor, times: Tensor) -> Tensor:
        """The velocity at the target tokens."""
        reference = batch.reference
        img_ids, txt_ids = prepare_ids(
            batch.features.shape[1],
            batch.grid,
            None if reference is None else batch.grid,
            self.transformer.version,
            self.device,
        )
        tokens = noisy if reference is None else torch.cat([noisy, reference.to(noisy)], 1)
        # A whole model that is trained is float32; a LoRA sees to its precision itself.
        widened = self.dtype != self.transformer.dtype
        with torch.autocast(self.device.type, self.dtype, widened):
            answer = self.transformer(
                hidden_states=tokens.to(self.dtype),
                encoder_hidden_states=batch.features.to(self.device, self.dtype),
                prompt_embeds_mask=batch.mask.to(self.device),
                timestep=times,
                img_ids=img_ids,
                txt_ids=txt_ids,
                return_dict=False,
            )[0]
        return answer[:, : noisy.shape[1]]

    def _shift(self, batch: FeatureBatch) -> tuple[float, float]:
        if self.config.time_shift == "resolution":
            shift = resolution_shift(batch.target.shape[1])
            return shift, shift
        return self.config.time_shift

    def _weights(self, batch: FeatureBatch) -> Tensor | None:
        weight = self.config.changed_weight
        if not weight or batch.reference is None:
            return None
        if batch.changed is None:
            raise InvalidRequest(
                f"changed_weight {weight:g}: the data do not say what an edit changes "
                f"({batch.names[0]}): set it to 0"
            )
        return token_weights(batch.changed.to(self.device), weight, 0.0)

    def dismiss_frozen_networks(self) -> None:
        """Take autoencoder and language model off the device, or out of memory altogether.

        They stay in main memory where samples or the result need them.
        """
        if self.config.samples or isinstance(self.config, FullRun):
            self._waiting_place = torch.device("cpu")
            self._move_frozen_networks(self._waiting_place)
        else:
            self.pipeline.register_modules(text_encoder=None, vae=None)
            gc.collect()  # a streamed network and its hooks hold each other
            give_back()

    @contextmanager
    def frozen_networks(self) -> Iterator[None]:
        """Have them on the device for a while."""
        self._move_frozen_networks(self.device)
        try:
            yield
        finally:
            self._move_frozen_networks(self._waiting_place)

    def _move_frozen_networks(self, place: torch.device) -> None:
        if self.config.offload != "none":
            return  # their blocks wait elsewhere as it is
        for network in (self.pipeline.text_encoder, self.pipeline.vae):
            nn.Module.to(network, place)


def _make_trainable(transformer: Any, config: TuningRun) -> None:
    stored = [name for name, m in transformer.named_modules() if isinstance(m, StoredLinear)]
    if stored:
        raise InvalidRequest(
            f"{config.model} stores {len(stored)} layers in few bits, which cannot be trained: "
            "write it in full with `step1x convert --to diffusers`, or train a LoRA"
        )
    ranks.spread(transformer, transformer.device)  # before it doubles in size
    # Steps of 1e-5 are lost in bfloat16, which has three digits.
    transformer.float().requires_grad_(True)


def _refuse_unknown_change(config: TuningRun, data: pairs.CheckedData) -> None:
    for example in data.examples:
        if config.changed_weight and example.source is not None and example.mask is None:
            raise InvalidRequest(
                f"changed_weight {config.changed_weight:g}: {example.name} has no mask that says "
                "what the edit changes: set it to 0, or give shards and the data engine alone"
            )


def example_generator(seed: int, step: int, place: int) -> torch.Generator:
    """The source of an example's noise, a function of seed, step and its place in the batch."""
    mixed = np.random.SeedSequence([seed, step, place]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


@contextmanager
def _silent(_: str) -> Iterator[Advance]:
    yield lambda *_: None


def train(
    config: TuningRun, *, stage: Stage = _silent, watch: Watch | None = None
) -> signal.Signals | None:
    """Train, or go on training, and write the result into the run's folder.

    Args:
        config: A `LoraRun` or a `FullRun`.
        stage: Shows what is going on before the first step.
        watch: Sees each step.

    Returns:
        The signal that stopped the run; None when it is complete.

    Raises:
        InvalidRequest: The data, the model or a setting cannot be used.
        CheckpointError: The model or the checkpoints are not what they should be.
        MissingExtra: The optimiser's package is not installed.
        Step1XEditError: The loss is not finite, or the disk is full.
    """
    # 1. What can be refused, before anything is loaded.
    if config.optimizer == "adamw8bit":  # its blocks of 256 numbers do not end where parts do
        ranks.refuse_several("adamw8bit works", "give adamw")
    if config.offload != "none":
        ranks.refuse_several(f"offload {config.offload} works", "they share the weights out: none")
    check_optimizer(config.optimizer)
    requests = Samples.requests(config)
    with stage("looking at the data") as advance:
        data = ranks.by_first(lambda: pairs.check(config.data, advance))
    _refuse_unknown_change(config, data)
    with alone(config.folder) if ranks.is_first() else nullcontext():
        return _train(config, data, requests, stage, watch)


def _train(
    config: TuningRun,
    data: pairs.CheckedData,
    requests: list[EditRequest],
    stage: Stage,
    watch: Watch | None,
) -> signal.Signals | None:
    # 2. The model, and where the run stood.
    with stage(f"loading {config.model}"):
        tuning = Tuning(config)
    run = _begin(config, tuning)
    run.restore()
    logger.info("step %d of %d", run.step, run.num_steps)

    # 3. What the frozen networks say of the data.
    with stage("reading the data with the frozen networks") as advance:
        batches = feature_batches(
            data,
            tuning.pipeline,
            seed=config.seed,
            first_batch=run.step,
            instruction_dropout=config.instruction_dropout,
            zh_share=config.zh_share,
            on_progress=advance,
        )
    if not batches.needs_networks:
        tuning.dismiss_frozen_networks()
    tuning.bring_transformer()

    # 4. The steps.
    results = Results(config, tuning, run, data)
    watchers = [watch, results.keep]
    if requests:
        watchers.append(Samples(config, tuning, run, requests).after_step)
    with TensorBoard(config, run.step) as board:
        stopped = run_loop(
            run,
            batches,
            lambda batch: (
                tuning.loss_of(batch, run.step),
                len(batch.names),
            ),
            pace=Pace.of(config),
            watch=all_of([*watchers, board.after_step]),
        )

    # 5. The result.
    if stopped is None:
        results.finish()
    return stopped


def _begin(config: TuningRun, tuning: Tuning) -> TrainingRun:
    parameters = [p for p in tuning.trained.parameters() if p.requires_grad]
    return TrainingRun(
        config.folder,
        tuning.trained,
        [build_optimizer(config.optimizer, parameters, config.lr, config.weight_decay)],
        config.lr,
        config.num_steps,
        warmup_steps=config.warmup_steps,
        decay_share=0.0 if config.schedule == "constant" else 1.0,
        decay="cosine" if config.schedule == "cosine" else "linear",
        ema_decay=config.ema_decay,
        keep_every=config.keep_every,
        # However they are stored.
        began_with=tuning.editor.model_hash.partition("-")[0],
    )


@dataclass(frozen=True)
class Results:
    """Writes what a run has made.

    Attributes:
        config: The run's settings.
        tuning: The model.
        run: How far it is.
        data: What it has seen.
    """

    config: TuningRun
    tuning: Tuning
    run: TrainingRun
    data: pairs.CheckedData

    def keep(self, report: StepReport) -> None:
        """Write a LoRA beside each checkpoint that is kept."""
        every = self.config.keep_every
        if every and report.step % every == 0 and report.step < report.num_steps:
            self._write_lora(self.config.folder / "kept" / f"step_{report.step:08d}")

    def finish(self) -> None:
        """Write the result and the card."""
        folder = self.config.folder
        is_lora = isinstance(self.config, LoraRun)
        written = self._write_lora(folder) if is_lora else self._write_model(folder)
        if not ranks.is_first():
            return
        card = Card(
            config=self.config.model_dump(mode="json"),
            model_hash=self.tuning.editor.model_hash,
            version=self.tuning.transformer.version,
            num_parameters=sum(p.numel() for p in self.run.parameters.values()),
            samples_seen=self.run.samples_seen,
            num_examples=self.data.num_examples,
            hashes=self.data.hashes(),
            files=[path.relative_to(folder) for path in written],
        )
        write_card(folder, card)

    def _write_lora(self, folder: Path) -> list[Path]:
        config = self.config
        if not isinstance(config, LoraRun):
            return []
        transformer = self.tuning.transformer
        with self.run.averaged():
            taken = lora.taken_from(transformer, config.alpha, getattr(torch, config.save_dtype))
        if not ranks.is_first():
            return []
        said = lora.describe(
            config, transformer.version, taken, self.run.step, self.data.num_examples
        )
        return lora.write_files(taken, folder, config.layouts, said)

    def _write_model(self, folder: Path) -> list[Path]:
        layouts = self.config.layouts  # pyright: ignore[reportAttributeAccessIssue] - of a FullRun
        written = []
        self.run.load_ema_into(self.run.trained)
        transformer = ranks.collected(self.tuning.transformer)
        if not ranks.is_first():
            return []
        self.tuning.pipeline.register_modules(transformer=transformer)
        nn.Module.to(transformer, "cpu", getattr(torch, self.config.save_dtype))
        if "official" in layouts:
            written.append(folder / f"step1x-edit-{transformer.version}.safetensors")
            transformer.to_official(written[-1])
        if "diffusers" in layouts:
            written.append(folder / "model")
            beside = folder / "model.partial"
            shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
            self.tuning.pipeline.save_pretrained(beside)
            shutil.rmtree(written[-1], ignore_errors=True)
            beside.rename(written[-1])
        return written
