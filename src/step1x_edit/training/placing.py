"""Where the networks of a run wait until they are needed.

Each is needed once: autoencoder and language model read the data, then the transformer is trained.
On a GPU a LoRA run therefore never holds both: everything is read into main memory, and the
transformer's weights come to the device after the others have left it, or block by block whenever
they run. Called by `tuning`.
"""

from collections.abc import Callable

import torch

from step1x_edit.editor import Editor
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.runtime.apply import choose_device, choose_dtype
from step1x_edit.runtime.offload import hold_back, park_head, stream_from_memory
from step1x_edit.training import ranks
from step1x_edit.training.config import LoraRun, Offload, TuningRun

Opened = tuple[Editor, Callable[[], None]]
"""A model, and what brings its transformer to the device."""


def open_model(config: TuningRun) -> Opened:
    """The model of a run, and what brings its transformer to the device.

    Raises:
        InvalidRequest: The model is unknown, or the device is not there.
        CheckpointError: The model's files are not what they should be.
    """
    runtime = config.runtime()
    device = choose_device(runtime.device)
    waits = isinstance(config, LoraRun) and device.type == "cuda" and config.offload != "disk"
    if not waits or ranks.world_size() > 1:  # several processes share the weights out at once
        return Editor.load(config.model, runtime), _there_already
    dtype = str(choose_dtype(runtime.dtype, device)).removeprefix("torch.")
    in_memory = {"device": "cpu", "dtype": dtype, "offload": "none"}
    editor = Editor.load(config.model, runtime.model_copy(update=in_memory))
    return editor, place(editor.pipeline, config.offload, device)


def place(
    pipeline: Step1XEditPipeline, offload: Offload, device: torch.device
) -> Callable[[], None]:
    """Put the networks where the data can be read.

    Args:
        pipeline: In main memory, without adapters.
        offload: "none", or "block": then the blocks of both networks stay in main memory.
        device: Where they run.

    Returns:
        Brings the transformer, which waits.
    """
    pipeline.vae.to(device)
    if offload == "block":
        stream_from_memory(pipeline.text_encoder, device)
        park_head(pipeline.text_encoder)
        stream_from_memory(pipeline.transformer, device)
        return _there_already
    pipeline.text_encoder.to(device)
    park_head(pipeline.text_encoder)
    return hold_back(pipeline.transformer, device)


def _there_already() -> None:
    pass
