"""The one order in which a `RuntimeConfig` is applied: threads, device, precision, offload.

`Editor.load` calls `load_pipeline`. What is built into a pipeline later (adapters, caches) comes on
top of it.
"""

import logging
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from step1x_edit.checkpoints.load import build_pipeline, load_autoencoder, load_networks
from step1x_edit.checkpoints.resolve import ModelFiles
from step1x_edit.checkpoints.tensor_files import TensorFiles, read_places
from step1x_edit.errors import InvalidRequest
from step1x_edit.model.instruction_config import InstructionConfig
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.request import RuntimeConfig
from step1x_edit.runtime.disk import BlockStream, StreamTimes
from step1x_edit.runtime.heap import give_back, keep_nothing_large
from step1x_edit.runtime.load import NetworkLoader, open_text_encoder, open_transformer
from step1x_edit.runtime.offload import offload_to_memory, park_head
from step1x_edit.runtime.precision import FILE_DTYPES

logger = logging.getLogger(__name__)

OFFLOADS = {"cuda": ("none", "model", "block", "disk"), "cpu": ("none", "block", "disk")}
"""Kind of device → where weights can wait, each with less memory than the one before. On a CPU main
memory is the device: `model` saves nothing there; see `_left_on_disk` for `block`."""


@dataclass
class DiskStreams:
    """The blocks of a pipeline that are read from their files.

    Attributes:
        streams: One for each row of blocks.
        times: What the reading took.
        files: Component → its files, which count what was read.
    """

    streams: list[BlockStream]
    times: StreamTimes
    files: dict[str, TensorFiles]

    def remove(self) -> None:
        """Read all blocks into memory and stop streaming; results stay the same to the bit."""
        for stream in self.streams:
            stream.remove()


class Loaded(NamedTuple):
    """A pipeline, and what reads its blocks where they wait on the disk."""

    pipeline: Step1XEditPipeline
    streams: DiskStreams | None


def load_pipeline(
    files: ModelFiles, instruction: InstructionConfig, runtime: RuntimeConfig
) -> Loaded:
    """A model as a pipeline that runs as `runtime` says.

    Args:
        files: From `checkpoints.resolve`, checked.
        instruction: How it wants its instructions, with the prefix.
        runtime: Device, threads, precision, offload.

    Raises:
        InvalidRequest: The device is not there.
        CheckpointError: The files are not what they should be.
    """
    # 1. Where it computes.
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    device = choose_device(runtime.device)
    dtype = choose_dtype(runtime.dtype, device)
    keep_nothing_large()

    # 2. The networks, in the precision that they keep, or left in their files.
    places = {name: files.components[name] for name in ("text_encoder", "transformer")}
    opened = open_networks(places, runtime, dtype, device)
    if opened is None:
        networks, streams = load_networks(files, dtype), None
    else:
        networks, streams = {**opened.networks, "vae": load_autoencoder(files)}, opened.streams
    pipeline = build_pipeline(files, networks, instruction)

    # 3. Where the weights wait.
    if runtime.offload in ("model", "block") and device.type != "cpu":
        offload_to_memory(pipeline, runtime.offload, device)
    else:
        pipeline.to(device)  # what is streamed is there already
    if runtime.offload == "model" and device.type == "cpu":
        logger.warning(
            "offload model keeps weights in main memory, which is where a CPU has them: it saves "
            "nothing here; block saves the language model, disk nearly everything"
        )
    if device.type != "cpu" and runtime.offload in ("none", "block"):
        park_head(pipeline.text_encoder)
    give_back()
    return Loaded(pipeline, streams)


class Opened(NamedTuple):
    """Transformer and text encoder, and what reads their blocks."""

    networks: dict[str, Any]
    streams: DiskStreams | None


def open_networks(
    places: Mapping[str, Path], runtime: RuntimeConfig, dtype: torch.dtype, device: torch.device
) -> Opened | None:
    """The networks that can be stored in few bits and streamed.

    Args:
        places: "transformer" → its folder or an official file, "text_encoder" → its folder.
        runtime: Says how they are stored, and where they wait.
        dtype: Compute precision.
        device: Where they run.

    Returns:
        None where nothing of this is asked for and the files are plain: then the libraries' own
        loading will do.

    Raises:
        CheckpointError: The files are not what they should be.
    """
    on_disk = _left_on_disk(runtime.offload, device)
    if runtime.weights == "auto" and not on_disk and not any(map(_few_bits, places.values())):
        return None
    waits = torch.device("cpu") if runtime.offload in ("model", "block") else device
    opened = {
        "text_encoder": open_text_encoder(places["text_encoder"]),
        "transformer": open_transformer(places["transformer"]),
    }
    precision = None if runtime.weights == "auto" else runtime.weights
    loaders = {
        name: NetworkLoader(model, files, precision, dtype, waits)
        for name, (model, files) in opened.items()
    }
    num_bytes = sum(files.num_bytes for _, files in opened.values())
    keep_cached = num_bytes < free_memory() / 2
    for name, loader in loaders.items():
        loader.files.keep_cached = keep_cached
        if name not in on_disk:
            loader.load()
    networks = {name: model for name, (model, _) in opened.items()}
    streamed = {name: loader for name, loader in loaders.items() if name in on_disk}
    return Opened(networks, _stream(streamed) if streamed else None)


def _left_on_disk(offload: str, device: torch.device) -> tuple[str, ...]:
    """Networks whose blocks are read from the files when they are needed."""
    if offload == "disk":
        return "text_encoder", "transformer"
    # A CPU's own memory is where blocks would wait. What runs once an edit need not wait there:
    # each of its blocks is read once, either way.
    return ("text_encoder",) if offload == "block" and device.type == "cpu" else ()


def _few_bits(place: Path) -> bool:
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    return any(
        tensor.dtype in FILE_DTYPES for file in files for tensor in read_places(file).values()
    )


def _stream(loaders: Mapping[str, NetworkLoader]) -> DiskStreams:
    times = StreamTimes()
    reader = ThreadPoolExecutor(1, "step1x-disk")
    rows = [row for loader in loaders.values() for row in loader.stream(reader, times)]
    return DiskStreams(rows, times, {name: loader.files for name, loader in loaders.items()})


def free_memory() -> float:
    """Bytes of main memory that are to be had now; without end where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return math.inf


def choose_device(name: str) -> torch.device:
    """The device of a `RuntimeConfig`.

    Raises:
        InvalidRequest: This machine has none of that name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    present = {
        "cpu": True,
        "cuda": int(index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present[kind]:
        raise InvalidRequest(f"device {name!r} is not there: give another, or auto")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute precision of a `RuntimeConfig`."""
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else torch.bfloat16
