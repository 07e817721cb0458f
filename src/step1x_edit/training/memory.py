"""How much memory a LoRA run takes, known before it starts, for every way to run it.

As `runtime.memory` does for an edit: the real networks with a real LoRA make the loss of the real
objective and its gradients on tensors without values. Of each row of equal blocks three are run,
and the step is put together of their pieces: what the middle one adds and takes, forward and
backward, is repeated. `step1x doctor --train` prints the result.

The peak is that of a step from the second on: the optimiser's state is made in the first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from step1x_edit.editor import Editor
from step1x_edit.images import fit_size
from step1x_edit.model.latents import PIXELS_PER_TOKEN
from step1x_edit.runtime.blueprint import Blueprint
from step1x_edit.runtime.memory import (
    WEIGHTS,
    DeviceKind,
    Estimate,
    Simulation,
    square_picture,
)
from step1x_edit.runtime.peak import PeakTracker
from step1x_edit.training import lora
from step1x_edit.training.config import LoraRun, Offload, Optimizer
from step1x_edit.training.data_config import EnginePairs
from step1x_edit.training.feature_batch import FeatureBatch
from step1x_edit.training.tuning import Tuning

NUM_RUN = 3
"""Blocks of a row that are run: the first and the last differ from those between them."""
MASTER_BYTES = 4
"""Of each trained number: float32, whatever the model computes in."""
_8BIT_BLOCK, _8BIT_LEAST = 256, 4096
"""bitsandbytes keeps a float32 scale for so many numbers of a state (Dettmers et al. 2022), and
states of fewer numbers in float32."""


def estimate(
    plan: Blueprint,
    config: LoraRun,
    *,
    dtype: torch.dtype,
    kind: DeviceKind,
    weights: Sequence[str] = WEIGHTS,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[Optimizer, list[Estimate]]:
    """The peaks of all ways to run a LoRA's training, by optimiser.

    Args:
        plan: The model.
        config: Its rank, layers, average, samples, and the heaviest batches of its data count;
            pictures are square ones of that level, and each has one to edit beside it.
        dtype: Compute precision.
        kind: "cuda" for any GPU with memory of its own, "cpu" for whatever runs in main memory.
        weights: Which ways to store them.
        on_progress: Called with the parts done and the parts in all.

    Raises:
        CheckpointError: The model's files do not fit it.
        InvalidRequest: No layer has the name that the run asks for.
    """
    trained = _Trained.of(plan, config)
    found: dict[Optimizer, list[Estimate]] = {"adamw": [], "adamw8bit": []}
    for number, stored in enumerate(weights):
        on_progress(number, len(weights))
        for each in _ways(plan, config, stored, dtype, kind):
            for optimizer, estimates in found.items():
                beside = trained.num_bytes(optimizer, averaged=config.ema_decay is not None)
                stages = {
                    stage: peak + (0 if stage == "loading" else beside)
                    for stage, peak in each.stages.items()
                }
                estimates.append(replace(each, stages=stages))
    on_progress(len(weights), len(weights))
    return found


def _ways(
    plan: Blueprint, config: LoraRun, weights: str, dtype: torch.dtype, kind: DeviceKind
) -> Iterator[Estimate]:
    """What each way takes, without what is trained and its optimiser."""
    rows = square_picture(plan, config.data.heaviest[0])
    sizes_drawn = [sample.size_level_px or plan.size_level_px for sample in config.samples]
    simulated = Simulation(plan, weights, dtype, kind, NUM_RUN)
    counts = _row_lengths(plan)
    parts: dict[bool, _Parts] = {}
    for streamed in (False, True):
        if streamed:
            simulated.stream()
        pipeline = simulated.pipeline()
        reading = simulated.read(pipeline, rows, 1).peaks
        drawing = 0
        if sizes_drawn:
            drawn = square_picture(plan, max(sizes_drawn))
            drawing = max(simulated.stages(drawn, guided=True).values())
        tuning = Tuning(config, (Editor(pipeline, config.model, ""), lambda: None))
        _forget_values(tuning.transformer, simulated.mode)
        with simulated.mode:
            parts[streamed] = _Parts(reading, _step(tuning, counts), drawing)
        tuning.transformer.unload_lora()  # the second round puts on its own
    sizes, stays = simulated.bytes, _networks_stay(config, kind)
    # Without checkpointing, blocks that wait are refused.
    for offload in get_args(Offload) if config.gradient_checkpointing else ("none",):
        blocks_wait = offload == "disk" or (offload == "block" and kind == "cuda")
        language_waits = offload != "none"
        transformer = sizes["transformer"].disk if blocks_wait else sizes["transformer"].device
        language = sizes["text_encoder"]
        if language_waits:
            kept = language.block if kind == "cuda" and offload == "block" else language.disk
        else:
            kept = language.device
        frozen = kept + sizes["vae"].device
        # On a GPU the whole transformer comes when the others have left.
        beside = 0 if kind == "cuda" and offload == "none" else transformer
        reading = parts[language_waits].reading
        stages = {stage: frozen + beside + peak for stage, peak in reading.items()}
        stages["steps"] = transformer + parts[blocks_wait].step + (frozen if stays else 0)
        if sizes_drawn:  # by then all networks are where they run
            stages["samples"] = frozen + transformer + parts[blocks_wait].drawing
        if offload == "none" and kind == "cpu":
            stages = {"loading": simulated.loading, **stages}
        waiting = simulated.total if kind == "cuda" and offload != "disk" else 0
        yield Estimate(weights, offload, False, stages, waiting)


class _Parts(NamedTuple):
    """Peaks beside the weights, in bytes."""

    reading: dict[str, int]
    step: int
    drawing: int
    """Of a sample; 0 where there is none."""


def _networks_stay(config: LoraRun, kind: DeviceKind) -> bool:
    """Whether autoencoder and language model are on the device while the transformer is trained."""
    engine = any(isinstance(dataset, EnginePairs) for dataset in config.data.datasets)
    return engine or (kind == "cpu" and bool(config.samples))


@dataclass(frozen=True)
class _Trained:
    """Numbers of each matrix that is trained."""

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, plan: Blueprint, config: LoraRun) -> "_Trained":
        model = plan.networks()["transformer"].model
        return cls(tuple(lora.matrix_sizes(model, config)))

    def num_bytes(self, optimizer: Optimizer, *, averaged: bool) -> int:
        """What is there between two steps: the matrices, their average, the optimiser's state."""
        masters = sum(self.sizes) * MASTER_BYTES * (2 if averaged else 1)
        return masters + 2 * sum(_state_bytes(optimizer, size) for size in self.sizes)


def _state_bytes(optimizer: Optimizer, size: int) -> int:
    """One of AdamW's two moments of `size` numbers."""
    if optimizer == "adamw" or size < _8BIT_LEAST:
        return size * MASTER_BYTES
    return size + -(-size // _8BIT_BLOCK) * 4


def _row_lengths(plan: Blueprint) -> Mapping[str, int]:
    """Class of a block → how many of them the transformer has."""
    model = plan.networks()["transformer"].model
    lengths: dict[str, int] = {}
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        lengths[type(block).__name__] = lengths.get(type(block).__name__, 0) + 1
    return lengths


class _Place(NamedTuple):
    """A block of a row, or what stands before all of them."""

    row: str = ""
    number: int = 0


class _Piece(NamedTuple):
    """From where a block begins, forward or backward, to where the next one does."""

    place: _Place
    added: int
    """Bytes that stay, less those that went."""
    peak: int
    """Above where it began."""


class _Pieces:
    """Divides what a tracker counts into pieces.

    Args:
        tracker: Is at work.
    """

    def __init__(self, tracker: PeakTracker) -> None:
        self.tracker = tracker
        self.found: list[_Piece] = []
        self._place, self._start = _Place(), tracker.now

    def begin(self, place: _Place) -> None:
        """End the piece at hand, and begin another."""
        tracker = self.tracker
        peak = tracker.peak - self._start
        self.found.append(_Piece(self._place, tracker.now - self._start, peak))
        self._place, self._start = place, tracker.now
        tracker.peak = tracker.now

    def whole_peak(self, lengths: Mapping[str, int]) -> int:
        """The peak of the whole step where rows have `lengths` blocks."""
        now = peak = 0
        for piece in self.found:
            is_middle = piece.place.row and piece.place.number == 1
            times = lengths[piece.place.row] - NUM_RUN + 1 if is_middle else 1
            for _ in range(max(times, 1)):
                peak = max(peak, now + piece.peak)
                now += piece.added
        return peak


def _forget_values(transformer: nn.Module, mode: FakeTensorMode) -> None:
    """Make tensors without values of a new LoRA's matrices, which PEFT has to make with values."""
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, FakeTensor):
                setattr(module, name, mode.from_tensor(parameter))


def _step(tuning: Tuning, lengths: Mapping[str, int]) -> int:
    """The peak of a step beside weights, matrices and optimiser; gradients are counted."""
    transformer = tuning.transformer
    if tuning.config.gradient_checkpointing:
        # Nothing is drawn in a block, and the state of a generator is no tensor without values.
        transformer.enable_gradient_checkpointing(
            lambda block, *inputs: checkpoint(
                block.__call__, *inputs, use_reentrant=False, preserve_rng_state=False
            )
        )
    batch = random_batch(tuning)
    tracker = PeakTracker()
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        tracker.know(tensor)
    hooks = []
    with tracker:
        pieces = _Pieces(tracker)
        for row in (transformer.transformer_blocks, transformer.single_transformer_blocks):
            for index, block in enumerate(row):
                begin = _begins(pieces, _Place(type(block).__name__, index))
                hooks.append(block.register_forward_pre_hook(begin, prepend=True))
        tuning.loss_of(batch, 0).backward()
        pieces.begin(_Place())
    for hook in hooks:
        hook.remove()
    return pieces.whole_peak(lengths)


def _begins(pieces: _Pieces, place: _Place) -> Callable[..., None]:
    return lambda *_: pieces.begin(place)


def random_batch(tuning: Tuning) -> FeatureBatch:
    """Square pictures of the run's size, as feature caches give them, and the longest instruction.

    Under `FakeTensorMode` they have no values.
    """
    size_level_px, batch_size = tuning.config.data.heaviest
    width, height = fit_size(*[size_level_px] * 3)
    grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
    sizes = tuning.transformer.config
    tokens = torch.randn(2, batch_size, grid[0] * grid[1], sizes["in_channels"])
    length = tuning.pipeline.instruction.max_length
    return FeatureBatch(
        names=("any",) * batch_size,
        target=tokens[0],
        reference=tokens[1],
        grid=grid,
        features=torch.randn(batch_size, length, sizes["connector_in_channels"]),
        mask=torch.ones(batch_size, length, dtype=torch.bool),
        changed=torch.ones(tokens.shape[1:3]),
    )
