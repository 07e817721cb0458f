"""Weights that wait in main memory until the GPU needs them, by diffusers' own hooks.

Called by `apply`, but where the networks run on the CPU: main memory is where they are then, and
there is nothing to move. Blocks that wait in files are the work of `disk`.
"""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers.hooks.group_offloading import apply_group_offloading
from torch import Tensor, nn

from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.runtime.disk import (
    BlockStream,
    StreamTimes,
    Weights,
    empty_parameter,
    recognise_by,
    sample_of,
)
from step1x_edit.runtime.precision import blocks


def offload_to_memory(
    pipeline: Step1XEditPipeline, unit: Literal["model", "block"], device: torch.device
) -> None:
    """Keep weights in main memory and bring them to the device for their turn.

    Args:
        pipeline: With all networks on the CPU.
        unit: What is brought at once: a network, or a block, the next one on a stream of its own
            where the device has streams.
        device: Where they run.
    """
    if unit == "model":
        pipeline.enable_model_cpu_offload(device=device)
        # The pipeline enters the language model one level further down.
        add_hook_to_module(pipeline.text_encoder.model, CpuOffload(device))
    else:
        apply_group_offloading(
            pipeline.transformer,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
        )
        stream_from_memory(pipeline.text_encoder, device)
        pipeline.vae.to(device)


def park_head(text_encoder: Any) -> None:
    """Let the language model's output layer wait in main memory until it is used; no edit does.

    Args:
        text_encoder: On a GPU.
    """
    head = text_encoder.lm_head
    if head.weight is text_encoder.get_input_embeddings().weight:
        return

    def bring(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        module.to(inputs[0].device)

    head.to("cpu")
    head.register_forward_pre_hook(bring)


def stream_from_memory(model: Any, device: torch.device) -> BlockStream:
    """Bring a model's blocks to the device one by one, and the rest for good.

    For the language model, which the pipeline enters through its inner modules: diffusers' hooks
    stand on the outer one. It runs once an edit, so that there is nothing to gain from more. And
    for a transformer that is trained: diffusers' hooks move a block's adapters with it, away from
    their gradients, or give them back as they were before the step.

    Args:
        model: On the CPU; see `precision.blocks`.
        device: Where it runs.
    """
    streamed = [block for _, block in blocks(model)]
    waiting = _emptied([each for block in streamed for each in block.parameters()], device)
    model.to(device)
    recognise_by(
        model, lambda: hashlib.sha256(b"".join(map(sample_of, waiting.values()))).hexdigest()
    )

    def bring(block: nn.Module) -> Weights:
        own = (parameter for parameter in block.parameters() if parameter in waiting)
        return {parameter: waiting[parameter].to(device) for parameter in own}

    return BlockStream(streamed, bring, ThreadPoolExecutor(1, "step1x-offload"), StreamTimes())


def hold_back(model: Any, device: torch.device) -> Callable[[], None]:
    """Keep a model's weights in main memory, though it says that it is on the device.

    Adapters that are put on it meanwhile are made on the device.

    Args:
        model: On the CPU.
        device: Where it will run.

    Returns:
        Brings them.
    """
    waiting = _emptied(model.parameters(), device)
    model.to(device)

    def bring() -> None:
        while waiting:
            parameter, weight = waiting.popitem()
            parameter.data = weight.to(device)

    return bring


def _emptied(parameters: Iterable[nn.Parameter], device: torch.device) -> Weights:
    """Take the weights out of parameters, which are on the device from now on."""
    waiting: Weights = {}
    for parameter in parameters:
        waiting[parameter] = parameter.data
        parameter.data = empty_parameter(parameter.shape, parameter.dtype, device).data
    return waiting
