"""How much memory an edit takes, known before it runs, for every way to run it.

The real networks, loaded and streamed by the real loaders, run the real pipeline on torch's fake
tensors, which have shapes and no values, and `PeakTracker` counts those that are alive. Of each row
of equal blocks two are run, and the bytes of the others are added. `step1x doctor` prints the
result.

What is counted is tensors. A process takes some memory besides: the interpreter and the libraries
(about half a GB), on a GPU the driver's context, and what kernels need for themselves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from step1x_edit.checkpoints.catalog import MINI_FOLDER
from step1x_edit.images import fit_size
from step1x_edit.model.guidance import is_guided
from step1x_edit.model.inputs import Row
from step1x_edit.model.instruction import InstructionConfig, InstructionTokens, encode_tokens
from step1x_edit.model.latents import PIXELS_PER_TOKEN, draw_noise
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.model.processor import PictureProcessor
from step1x_edit.request import RuntimeConfig
from step1x_edit.runtime.apply import OFFLOADS
from step1x_edit.runtime.blueprint import Blueprint, Network, ValuelessFiles, replace_shape
from step1x_edit.runtime.disk import StreamTimes
from step1x_edit.runtime.load import NetworkLoader
from step1x_edit.runtime.peak import peak_of
from step1x_edit.runtime.precision import (
    FILE_DTYPES,
    Precision,
    StoredLinear,
    bits_shape,
    blocks,
    scale_shape,
)

WEIGHTS: tuple[str, ...] = get_args(RuntimeConfig.model_fields["weights"].annotation)
STAGES = ("loading", "picture", "instruction", "steps", "decoding")
"""In which an edit can need most; an edit that goes on with a loaded model skips the first."""
NUM_RUN = 2
"""Blocks of a row of equal ones that are run: one streamed block has the next one beside it."""
NUM_CACHED = 3
"""Tensors of all picture tokens that TeaCache keeps (Liu et al. 2024, with the release's input):
the measured tokens of the last step, what the blocks last added, and, while they run, their input.
"""

DeviceKind = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Estimate:
    """What one way to run an edit takes.

    Attributes:
        weights: As of `RuntimeConfig`.
        offload: As of `RuntimeConfig`.
        step_cache: Whether TeaCache is on.
        stages: Stage → peak on the device while it runs, in bytes.
        main_memory: Bytes of weights that wait in main memory for a GPU.
    """

    weights: str
    offload: str
    step_cache: bool
    stages: Mapping[str, int]
    main_memory: int

    @property
    def stage(self) -> str:
        """Where the peak is."""
        return max(self.stages, key=lambda stage: self.stages[stage])

    @property
    def peak(self) -> int:
        """The most memory on the device, in bytes."""
        return self.stages[self.stage]


def estimate(
    plan: Blueprint,
    *,
    size_level_px: int,
    guidance: float,
    dtype: torch.dtype,
    kind: DeviceKind,
    weights: Sequence[str] = WEIGHTS,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Estimate]:
    """The peaks of all ways to run one edit of a square picture with the longest instruction.

    Args:
        plan: The model.
        size_level_px: The size level.
        guidance: As of a request; -1 runs one row instead of two.
        dtype: Compute precision.
        kind: "cuda" for any GPU with memory of its own, "cpu" for whatever runs in main memory.
        weights: Which ways to store them.
        on_progress: Called with the parts done and the parts in all.

    Raises:
        CheckpointError: The model's files do not fit it.
    """
    rows = square_picture(plan, size_level_px)
    guided = is_guided(guidance)
    found = []
    for number, stored in enumerate(weights):
        on_progress(number, len(weights))
        run = Simulation(plan, stored, dtype, kind)
        resident = run.stages(rows, guided)
        run.stream()
        streamed = run.stages(rows, guided)
        cache = run.step_cache(rows, guided)
        for offload in OFFLOADS[kind]:
            beside = streamed if offload in ("block", "disk") else resident
            if kind == "cpu" and offload == "block":
                beside = {**resident, "instruction": streamed["instruction"]}
            stages = run.with_weights(beside, offload)
            with_cache = {**stages, "steps": stages["steps"] + cache}
            main_memory = run.in_main_memory(offload) if kind == "cuda" else 0
            found += [
                Estimate(stored, offload, on, with_cache if on else stages, main_memory)
                for on in (False, True)
            ]
    on_progress(len(weights), len(weights))
    return found


class _Bytes(NamedTuple):
    """What the weights of a network take, in bytes."""

    total: int
    device: int
    """On the device where nothing waits; see `offload.park_head`."""
    block: int
    """On the GPU for good where blocks wait in main memory."""
    disk: int
    """In memory for good where blocks wait in the files."""


class Reading(NamedTuple):
    """What a step reads, and stage → peak beside the weights while it was made."""

    reference: Any
    features: Any
    peaks: dict[str, int]


class Simulation:
    """One precision of one model on tensors without values.

    Args:
        plan: The model.
        weights: As of `RuntimeConfig`.
        dtype: Compute precision.
        kind: See `estimate`.
        num_run: Blocks that are left of each row.
    """

    def __init__(
        self, plan: Blueprint, weights: str, dtype: torch.dtype, kind: str, num_run: int = NUM_RUN
    ) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.kind = kind
        with self.mode:
            like = torch.empty(0)
        precision = None if weights == "auto" else cast("Precision", weights)
        self.loaders: dict[str, NetworkLoader] = {}
        self.bytes: dict[str, _Bytes] = {}
        self.loading = 0
        for name, network in plan.networks().items():
            files = ValuelessFiles(network, like)
            cpu = torch.device("cpu")
            loader = NetworkLoader(network.model, files, precision, dtype, cpu)
            if kind == "cuda":  # what is read is made ready in main memory
                ready = Network(network.model, _as_stored(loader, files, dtype))
                loader.files = ValuelessFiles(ready, like)
            self.bytes[name] = _count(loader.model, dtype, head_waits=kind == "cuda")
            _shorten(loader.model, num_run)
            with self.mode:
                _, peak = peak_of(loader.load)
            beside = peak - _num_bytes(loader.model.parameters())
            self.loading = max(self.loading, beside + self.total)
            self.loaders[name] = loader
        self.vae = plan.vae()
        with self.mode:
            self.vae.to_empty(device="cpu")
        self.bytes["vae"] = _Bytes(*[_num_bytes(self.vae.parameters())] * 4)
        self.instruction = plan.instruction
        # Any will do: the tokens are made up.
        self.processor = PictureProcessor.from_pretrained(MINI_FOLDER / "processor")

    @property
    def total(self) -> int:
        """Bytes of the weights of all networks so far."""
        return sum(each.total for each in self.bytes.values())

    def stream(self) -> None:
        """From now on, blocks are read when they are needed."""
        for loader in self.loaders.values():
            with self.mode:
                loader.stream(AtOnce(), StreamTimes())

    def pipeline(self) -> Step1XEditPipeline:
        """The networks together."""
        networks: dict[str, Any] = {name: each.model for name, each in self.loaders.items()}
        made = Step1XEditPipeline(
            processor=self.processor, scheduler=FlowMatchEulerDiscreteScheduler(), vae=self.vae,
            instruction=self.instruction, **networks,
        )  # fmt: skip
        made.set_progress_bar_config(disable=True)
        return made

    def read(self, pipeline: Step1XEditPipeline, rows: list[Row], num_prompts: int) -> Reading:
        """What the frozen networks make of a picture and the longest instruction about it."""
        tokens = _longest_tokens(pipeline, rows[0].size, self.instruction, num_prompts)
        reference, picture = peak_of(lambda: pipeline.encode_references(rows), self.vae)
        features, instruction = peak_of(
            lambda: encode_tokens(pipeline.text_encoder, self.instruction, tokens),
            pipeline.text_encoder,
        )
        return Reading(reference, features, {"picture": picture, "instruction": instruction})

    def stages(self, rows: list[Row], guided: bool) -> dict[str, int]:
        """Stage → peak of what there is beside the weights that are in memory for good."""
        pipeline = self.pipeline()
        reference, features, peaks = self.read(pipeline, rows, 2 if guided else 1)
        guidance = 1.0 if guided else -1.0
        made, steps = peak_of(
            lambda: pipeline.denoise(rows, features, reference, 1, guidance, None),
            pipeline.transformer,
        )
        _, decoding = peak_of(lambda: pipeline.decode([made[0]], rows, "pt"), self.vae)
        return {**peaks, "steps": steps, "decoding": decoding}

    def with_weights(self, beside: Mapping[str, int], offload: str) -> dict[str, int]:
        """Stage → peak on the device, its weights included.

        Args:
            beside: From `stages`, before `stream` for the settings that load whole networks.
            offload: As of `RuntimeConfig`.
        """
        sizes = self.bytes
        if offload == "model":  # the autoencoder stays until all is brought back
            weights = dict.fromkeys(beside, sizes["vae"].device)
            weights["instruction"] += sizes["text_encoder"].device
            weights["steps"] += sizes["transformer"].device
        elif offload == "block" and self.kind == "cpu":
            kept = sizes["text_encoder"].disk + sizes["transformer"].device + sizes["vae"].device
            weights = dict.fromkeys(beside, kept)
        elif offload == "block":  # what is no block of the transformer goes after each step
            kept = sizes["vae"].device + sizes["text_encoder"].block
            weights = dict.fromkeys(beside, kept)
            weights["steps"] += sizes["transformer"].block
        else:
            each = [part.disk if offload == "disk" else part.device for part in sizes.values()]
            weights = dict.fromkeys(beside, sum(each))
        loading = {"loading": self.loading} if offload == "none" else {}
        return loading | {stage: weights[stage] + beside[stage] for stage in beside}

    def in_main_memory(self, offload: str) -> int:
        """Bytes of weights that wait there for a GPU."""
        if offload in ("model", "block"):
            return self.total
        return sum(part.total - part.device for part in self.bytes.values() if offload == "none")

    def step_cache(self, rows: list[Row], guided: bool) -> int:
        """Bytes that TeaCache keeps."""
        width, height = rows[0].size
        tokens = 2 * width * height // PIXELS_PER_TOKEN**2  # target and reference
        model = self.loaders["transformer"].model
        itemsize = model.x_embedder.weight.itemsize
        return NUM_CACHED * (2 if guided else 1) * tokens * model.inner_dim * itemsize


class AtOnce(Executor):
    """Carries out in the calling thread, where the tracker sees it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As of `Executor`."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _num_bytes(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _count(model: Any, dtype: torch.dtype, *, head_waits: bool) -> _Bytes:
    """What the weights of a network on the meta device will take."""
    streamed: dict[nn.Parameter, str] = {
        parameter: name for name, block in blocks(model) for parameter in block.parameters()
    }
    rows = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "lm_head", None)
    tied = head is not None and model.config.tie_word_embeddings
    total = device = block = disk = 0
    for parameter in model.parameters():
        is_head = head is not None and parameter is head.weight and parameter not in rows
        if is_head and tied:
            continue
        itemsize = dtype.itemsize if parameter.is_floating_point() else parameter.itemsize
        size = parameter.numel() * itemsize
        total += size
        if is_head and head_waits:
            continue
        device += size
        # diffusers' group offloading sees the rows of blocks that the network itself holds;
        # the language model's are all streamed by a hook of our own.
        if head is None:
            is_streamed = streamed.get(parameter, "..").count(".") == 1
        else:
            is_streamed = parameter in streamed
        block += 0 if is_streamed else size
        disk += 0 if parameter in streamed or parameter in rows or is_head else size
    return _Bytes(total, device, block, disk)


def _shorten(model: Any, num_run: int) -> None:
    """Leave `num_run` of each row of equal blocks."""
    kinds = set(model._no_split_modules)
    for row in list(model.modules()):
        if isinstance(row, nn.ModuleList) and row and type(row[0]).__name__ in kinds:
            del row[num_run:]
    for module in model.modules():
        whole = getattr(module, "fullatt_block_indexes", None)
        if whole and max(whole) >= num_run:  # some attend within windows, some to everything
            module.fullatt_block_indexes = [num_run - 1]


def _as_stored(loader: NetworkLoader, files: ValuelessFiles, dtype: torch.dtype) -> dict[str, Any]:
    """Where a loader would read tensors that are as the network keeps them."""
    places = {
        name: replace_shape(place, place.shape, dtype)
        for name, place in files.places.items()
        if not name.endswith("_scale")
    }
    kinds = {kind: bits for bits, kind in FILE_DTYPES.items()}
    for name, module in loader.model.named_modules():
        if isinstance(module, StoredLinear):
            key, shape = f"{name}.weight", (module.out_features, module.in_features)
            kind, place = module.precision, places[f"{name}.weight"]
            places[key] = replace_shape(place, bits_shape(shape, kind), kinds[kind])
            places[f"{key}_scale"] = replace_shape(place, scale_shape(shape, kind), dtype)
    return places


def square_picture(plan: Blueprint, size_level_px: int) -> list[Row]:
    """One square picture to edit."""
    size = fit_size(size_level_px, size_level_px, size_level_px)
    channels = plan.networks()["transformer"].model.config["in_channels"]
    noise = draw_noise((1, channels // 4, size[1] // 8, size[0] // 8), None)
    return [Row(Image.new("RGB", size), "", "", size, noise)]


def _longest_tokens(
    pipeline: Step1XEditPipeline, size: tuple[int, int], config: InstructionConfig, num_rows: int
) -> InstructionTokens:
    """The longest chat about a picture that the model takes, `num_rows` times."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    vision = pipeline.text_encoder.config.vision_config
    merge, side = vision.spatial_merge_size, vision.patch_size
    pixels = smart_resize(size[1], size[0], side * merge, config.min_pixels, config.max_pixels)
    height, width = (length // side for length in pixels)
    num_pictures = height * width // merge**2
    length = config.num_dropped_tokens + config.max_length
    ids = torch.zeros(num_rows, length, dtype=torch.long)
    ids[:, 1 : 1 + num_pictures] = pipeline.text_encoder.config.image_token_id
    is_picture = ids > 0
    values = vision.in_channels * vision.temporal_patch_size * side**2
    return InstructionTokens(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        position_ids=torch.arange(length).expand(3, num_rows, -1),
        mm_token_type_ids=is_picture.int(),
        quoted=torch.zeros_like(is_picture),
        lengths=torch.full((num_rows,), length),
        pixel_values=torch.zeros(num_rows * height * width, values),
        image_grid_thw=torch.tensor([[1, height, width]] * num_rows),
    )
