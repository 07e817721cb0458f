"""Train the mini: transformer, connector and instruction encoder together, from nothing.

What the transformer reads while training is what the pipeline gives it while editing: same tokens,
same ids, same instruction features; only the noise level is drawn at random.
"""

import logging
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from diffusers.models.activations import GELU
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from step1x_edit.model.batched_vision import batch_vision
from step1x_edit.model.guidance import prepare_ids
from step1x_edit.model.instruction import (
    InstructionEncoder,
    InstructionFeatures,
    load_text_encoder,
)
from step1x_edit.model.latents import PIXELS_PER_TOKEN, encode_pictures
from step1x_edit.model.processor import PictureProcessor
from step1x_edit.model.transformer import Step1XEditTransformer2DModel
from step1x_edit.runtime.heap import keep_freed_memory
from step1x_edit.training.alignment import SceneHead
from step1x_edit.training.config import EditRun
from step1x_edit.training.dataset import EditBatch, EditCollate, TripletBatches, batches, to_unit
from step1x_edit.training.lanes import Lanes
from step1x_edit.training.loop import Pace, TrainingRun, Watch, run_loop
from step1x_edit.training.mini import INSTRUCTION, build_text_encoder, build_transformer
from step1x_edit.training.objective import (
    add_noise,
    sample_times,
    token_weights,
    velocity_loss,
)
from step1x_edit.training.quick_blocks import QuickBlocks, can_quicken, quicken
from step1x_edit.training.quick_encoder import fold_downsampling

logger = logging.getLogger(__name__)

NOT_ORTHOGONALISED = (
    "embed",
    "norm",
    "mod",
    "adaLN",
    "transformer.proj_out",
    "global_proj",
    "patch_embed",
    "lm_head",
    "scene_head",
)
"""Parameters in whose names one of these stands keep AdamW: embeddings, modulations, the ends of
the network."""

NEWTON_SCHULZ_STEPS = 3
"""Of Muon; five, its default, cost a third of the training step at the mini's batch size."""
READING = ("text_encoder.", "transformer.connector.")
"""Beginnings of the names of the parameters that read the instruction."""
ADAMW_SHARE = 0.3
"""Modulations and embeddings take a smaller learning rate than orthogonalised matrices bear."""


@dataclass(frozen=True)
class _ReadBatch:
    """What the transformer is given of an `EditBatch`, and what its answers are held against."""

    target: Float[Tensor, "batch target_tokens channels"]
    reference: Float[Tensor, "batch target_tokens channels"] | None
    features: InstructionFeatures
    labels: Int[Tensor, "batch tokens 5"]
    cells: Float[Tensor, "batch target_tokens cells"]


class EditTraining:
    """The modules of a run and the loss of a batch.

    Args:
        config: The run's settings.
    """

    def __init__(self, config: EditRun) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        processor = PictureProcessor.from_pretrained(config.processor)
        self.transformer, text_encoder = begin_networks(config.start, processor)
        # On a CPU the exact GELU is faster than its tanh form; bfloat16 hardly tells them apart.
        for module in self.transformer.modules():
            if isinstance(module, nn.GELU | GELU):
                module.approximate = "none"
        self.encoder = InstructionEncoder(text_encoder, processor, INSTRUCTION)
        self.vae = AutoencoderDC.from_pretrained(config.vae).requires_grad_(False).eval()
        if not config.train_reading:
            text_encoder.requires_grad_(False)
            self.transformer.connector.requires_grad_(False)
        blocks = self.transformer.single_transformer_blocks
        middle = len(blocks) // 2
        self.scene_head = SceneHead(
            blocks[0], blocks[middle], blocks[middle + 1], self.transformer.inner_dim
        )
        self.quick: QuickBlocks | None = None
        if config.bf16 and can_quicken():
            self.quick = quicken(self.transformer)
            fold_downsampling(self.vae)
        nn.Module.to(self.vae, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - stubs lack it
        self._head_reads_last = blocks[middle + 1] is blocks[-1]
        self.trained = nn.ModuleDict(
            {
                "transformer": self.transformer,
                "text_encoder": self.encoder.text_encoder,
                "scene_head": self.scene_head,
            }
        )

    def loss_of(
        self, batch: EditBatch, source: torch.Generator | None = None
    ) -> tuple[Float[Tensor, ""], int]:
        """The weighted flow-matching loss of a batch, and its number of samples.

        Args:
            batch: The samples.
            source: Of noise and times; None: torch's own.
        """
        height, width = batch.target.shape[1:3]
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            read = self._read(batch)
            target, reference, features = read.target, read.reference, read.features
            if self.quick is not None:
                num_image = target.shape[1] * (1 if reference is None else 2)
                features = self.quick.trim(features, num_image)
                self.quick.own.num_targets = None if self._head_reads_last else target.shape[1]
            noise = torch.randn(target.shape, generator=source)
            times = sample_times(len(target), self.config.time_shift, source)
            noisy = add_noise(target, noise, times)
            img_ids, txt_ids = prepare_ids(
                features.features.shape[1],
                grid,
                None if reference is None else grid,
                self.transformer.version,
            )
            predicted = self.transformer(
                hidden_states=noisy if reference is None else torch.cat([noisy, reference], 1),
                encoder_hidden_states=features.features,
                prompt_embeds_mask=features.mask,
                timestep=times,
                img_ids=img_ids,
                txt_ids=txt_ids,
                return_dict=False,
            )[0][:, : target.shape[1]]
            scene_loss = self.scene_head.loss(read.labels, read.cells, grid)
        weight = token_weights(
            read.cells.mean(-1), self.config.changed_weight, self.config.outline_weight
        )
        loss = velocity_loss(predicted, target, noise, weight)
        return loss + self.config.scene_weight * scene_loss, len(target)

    def _read(self, batch: EditBatch) -> _ReadBatch:
        """Run autoencoder and instruction encoder; rows of like length come to lie together."""
        features = self.encoder.encode(batch.instructions)
        order = features.mask.sum(1).argsort()
        return _ReadBatch(
            target=self._tokens(batch.target)[order],
            reference=None if batch.source is None else self._tokens(batch.source)[order],
            features=InstructionFeatures(features.features[order], features.mask[order]),
            labels=batch.labels[order],
            cells=batch.cells[order],
        )

    @torch.no_grad()
    def _tokens(self, pictures: Tensor) -> Float[Tensor, "batch tokens channels"]:
        unit = to_unit(pictures).contiguous(memory_format=torch.channels_last)
        return encode_pictures(self.vae, unit).float()

    def save(self, folder: Path) -> None:
        """Write transformer and instruction encoder in the diffusers layout."""
        self.transformer.save_pretrained(folder / "transformer")
        self.encoder.text_encoder.save_pretrained(folder / "text_encoder")


def begin_networks(
    start: Path | None, processor: PictureProcessor
) -> tuple[Step1XEditTransformer2DModel, Qwen2_5_VLForConditionalGeneration]:
    """The networks of the model folder `start`, or untrained ones, made quick to train.

    At the mini's lengths written-out attention and one batched vision tower are several times
    faster than the stock kernels and the loop over pictures.
    """
    transformer, text_encoder = (
        (build_transformer(), build_text_encoder(processor))
        if start is None
        else _read_networks(start)
    )
    text_encoder.set_attn_implementation("eager")
    batch_vision(text_encoder)
    return transformer, text_encoder


def _read_networks(
    folder: Path,
) -> tuple[Step1XEditTransformer2DModel, Qwen2_5_VLForConditionalGeneration]:
    """The networks of a model folder, in float32."""
    transformer = Step1XEditTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.float32
    )
    return transformer, load_text_encoder(folder / "text_encoder", dtype=torch.float32)


def build_optimizers(
    named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for the rest.

    With `match_rms_adamw` (Liu et al. 2025, "Muon is scalable") Muon's updates have AdamW's size.
    """
    matrices, rest = [], []
    for name, parameter in named_parameters:
        inner = parameter.ndim == 2 and not any(part in name for part in NOT_ORTHOGONALISED)
        (matrices if inner else rest).append(parameter)
    return [
        torch.optim.Muon(
            matrices,
            lr=lr,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
            ns_steps=NEWTON_SCHULZ_STEPS,
        ),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def optimizers_of(
    trained: nn.ModuleDict, lr: float, reading_share: float
) -> tuple[list[torch.optim.Optimizer], tuple[float, ...]]:
    """A run's optimizers, and each one's part of the learning rate.

    Args:
        trained: All that is trained.
        lr: The learning rate.
        reading_share: Part of it for the reading (instruction encoder and connector), which has
            optimizers of its own where that is not 1.
    """
    named = list(trained.named_parameters())
    if reading_share == 1:
        return build_optimizers(named, lr), (1.0, ADAMW_SHARE)
    drawing = [pair for pair in named if not pair[0].startswith(READING)]
    reading = [pair for pair in named if pair[0].startswith(READING)]
    optimizers = [*build_optimizers(drawing, lr), *build_optimizers(reading, lr)]
    return optimizers, (1.0, ADAMW_SHARE, reading_share, reading_share * ADAMW_SHARE)


def train(config: EditRun, watch: Watch | None = None) -> signal.Signals | None:
    """Train, or go on training, and write the averaged weights to the run's ``model`` folder.

    Args:
        config: The run.
        watch: Sees each step.

    Returns:
        The signal that stopped the run; None when it is complete.
    """
    keep_freed_memory()
    training = EditTraining(config)
    share = config.reading_lr_share if config.train_reading else 1.0
    optimizers, lr_scales = optimizers_of(training.trained, config.lr, share)
    run = TrainingRun(
        config.folder,
        training.trained,
        optimizers,
        config.lr,
        config.num_steps,
        decay_share=config.decay_share,
        lr_scales=lr_scales,
        keep_every=config.keep_every,
    )
    run.restore()
    logger.info("step %d of %d", run.step, run.num_steps)
    collate = EditCollate(
        training.encoder.tokenizer,
        config.instruction_dropout,
        config.zh_share,
        config.text_to_image_share,
    )
    stream = TripletBatches(config.data, config.batch_size, collate, first_batch=run.step)
    stopped = run_loop(
        run, batches(stream), training.loss_of,
        pace=Pace.of(config), watch=watch, lanes=Lanes(config.parts),
    )  # fmt: skip
    run.load_ema_into(training.trained)
    training.save(config.folder / "model")
    return stopped
