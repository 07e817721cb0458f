"""★ Start here: `Editor` turns an `EditRequest` into an `EditResult`.

It finds a model, runs the pipeline, and puts what changed back into the user's own picture. Every
door (command line, HTTP, web page, nodes, benchmark) calls it and nothing below it.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from PIL import Image

from step1x_edit import images
from step1x_edit.checkpoints import constants, hub, resolve
from step1x_edit.checkpoints.catalog import DEFAULT_MODEL
from step1x_edit.checkpoints.lora import applied
from step1x_edit.errors import CheckpointError
from step1x_edit.model.inputs import one_negative
from step1x_edit.model.instruction_config import read_instruction
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.request import (
    AppliedLora,
    EditRequest,
    EditResult,
    LoraChoice,
    Provenance,
    RuntimeConfig,
)
from step1x_edit.runtime import shortage
from step1x_edit.runtime.apply import load_pipeline

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


class Editor:
    """A loaded model that edits pictures.

    Args:
        pipeline: The loaded pipeline.
        model: The name or path that it was loaded by.
        model_hash: Tells which weights these are; see `resolve.weights_hash`.
        lora: What has been put on it.
        runtime: How it runs here, for messages.
    """

    def __init__(
        self,
        pipeline: Step1XEditPipeline,
        model: str,
        model_hash: str,
        lora: Sequence[AppliedLora] = (),
        runtime: RuntimeConfig | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.model = model
        self.model_hash = model_hash
        self.lora = tuple(lora)
        self.runtime = runtime or RuntimeConfig.checked()
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, model: str = DEFAULT_MODEL, runtime: RuntimeConfig | None = None) -> "Editor":
        """Load a model.

        Args:
            model: A name of the catalogue, a hub repository, a diffusers-layout folder, a folder of
                official files, or an official transformer file with the others beside it.
            runtime: Precision, device, threads, where weights wait, LoRAs, whether to fetch what
                is not here.

        Raises:
            InvalidRequest: The model is unknown, or the device is not there.
            CheckpointError: Its files, or those of a LoRA, are not what they should be, or not
                here.
            OutOfMemory: There is no room for it.
            Step1XEditError: It cannot be fetched.
        """
        runtime = runtime or RuntimeConfig.checked()
        files = _files(model, offline=runtime.offline)
        files.check()
        instruction = constants.with_prefix(
            read_instruction(files.folder),
            official_source=runtime.official_source,
            offline=runtime.offline,
        )
        with shortage.named(runtime):
            pipeline = load_pipeline(files, instruction, runtime).pipeline
            if runtime.lora:
                _put_on(pipeline, runtime.lora)
        model_hash = resolve.weights_hash(files, runtime.weights)
        return cls(pipeline, model, model_hash, applied(runtime.lora), runtime)

    def edit(self, request: EditRequest, on_progress: Progress | None = None) -> EditResult:
        """Edit a picture, or draw one where the request has none.

        Args:
            request: What to do.
            on_progress: Called after each step.

        Raises:
            InvalidRequest: The picture, the mask or the instruction cannot be used.
            OutOfMemory: There is no room to run the model at this size.
        """
        started = time.perf_counter()
        # 1. Read and check everything before any network runs.
        picture, mask = _open(request)
        seed = secrets.randbits(32) if request.seed is None else request.seed
        settings = self._settings(request)
        opened = time.perf_counter()

        # 2. Run the model at its own size.
        def on_step(_: Any, step: int, *__: Any) -> None:
            if on_progress is not None:
                on_progress(step + 1, settings["num_inference_steps"])

        size_level = settings["size_level"] or self.pipeline.config["size_level"]
        with shortage.named(self.runtime, size_level):
            output: Any = self.pipeline(
                image=None if picture is None else picture.on_white,
                prompt=request.prompt,
                num_images_per_prompt=request.num_images,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
                return_references=True,
                callback_on_step_end=on_step,
                **settings,
            )
        results = [np.asarray(result, np.float32) for result in output.images]
        ran = time.perf_counter()

        # 3. Put the change back into the picture.
        if picture is None:
            finished = [_to_pil(result) for result in results]
        else:
            reference = np.asarray(output.references[0], np.float32)
            finished = [
                images.restore(picture, reference, result, keep=request.keep, mask=mask)
                for result in results
            ]
        height, width = results[0].shape[:2]
        provenance = Provenance(
            version=metadata.version("step1x-edit"),
            model=self.model,
            model_hash=self.model_hash,
            prompt=request.prompt,
            negative_prompt=settings["negative_prompt"],
            seed=seed,
            num_steps=settings["num_inference_steps"],
            guidance=settings["guidance_scale"],
            size_level_px=size_level,
            keep=request.keep,
            width=width,
            height=height,
            source_sha256=None if picture is None else picture.sha256,
            source_name=None if picture is None else picture.name,
            mask_sha256=None if mask is None else hashlib.sha256(mask.tobytes()).hexdigest(),
            lora=self.lora,
        )
        restored = time.perf_counter()
        seconds = {"read": opened - started, "model": ran - opened, "restore": restored - ran}
        return EditResult(images=finished, provenance=provenance, seconds=seconds)

    def _settings(self, request: EditRequest) -> dict[str, Any]:
        """The request's settings under the pipeline's names, the model's own where it has none."""
        own = self.pipeline.config
        return {
            "num_inference_steps": request.num_steps or own["num_inference_steps"],
            "guidance_scale": own["guidance_scale"]
            if request.guidance is None
            else request.guidance,
            # A drawn picture has a size of its own.
            "size_level": None
            if request.image is None
            else request.size_level_px or own["size_level"],
            "negative_prompt": one_negative(
                request.negative_prompt,
                is_drawn=request.image is None,
                own=own["draw_negative_prompt"],
            ),
            "width": request.width,
            "height": request.height,
        }


def _put_on(pipeline: Step1XEditPipeline, choices: Sequence[LoraChoice]) -> None:
    """Load LoRAs and weigh them; one of weight 0 is checked, but takes no part."""
    for number, choice in enumerate(choices):
        pipeline.load_lora_weights(choice.file, adapter_name=f"lora_{number}")
    weights = {f"lora_{n}": choice.weight for n, choice in enumerate(choices) if choice.weight}
    if weights:
        pipeline.set_adapters([*weights], [*weights.values()])
    else:
        pipeline.disable_lora()


def _open(request: EditRequest) -> tuple[images.Picture | None, Image.Image | None]:
    """The picture and the mask of a request, where it has them."""
    if request.image is None:
        return None, None
    picture = images.open_picture(request.image, max_pixels=request.max_pixels)
    if request.mask is None:
        return picture, None
    return picture, images.open_mask(request.mask, picture, max_pixels=request.max_pixels)


def _files(model: str, *, offline: bool) -> resolve.ModelFiles:
    """The model's files, fetched if need be."""
    files = resolve.find(model)
    if files is None and offline:
        raise resolve.not_here(model)
    if files is None:
        hub.fetch(hub.plan(model))
        files = resolve.find(model)
    if files is None:
        raise CheckpointError(f"{model!r} was fetched and is not whole: run `step1x models pull`")
    return files


def _to_pil(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
