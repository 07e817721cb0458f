"""★ Start here: `Editor` turns an `EditRequest` into an `EditResult`.

It finds a model, runs the pipeline, and puts what changed back into the user's own picture. Every
door (command line, HTTP, web page, nodes, benchmark) calls it and nothing below it.
"""

import hashlib
import secrets
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from step1x_edit import images
from step1x_edit.checkpoints.catalog import DEFAULT_MODEL, locate
from step1x_edit.checkpoints.contents import one_line, weights_hash
from step1x_edit.errors import CheckpointError
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.request import EditRequest, EditResult, Provenance, RuntimeConfig
from step1x_edit.runtime.apply import load_pipeline

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


class Editor:
    """A loaded model that edits pictures.

    Args:
        pipeline: The loaded pipeline.
        model: The name or path that it was loaded by.
        model_hash: Tells which weights these are; see `weights_hash`.
    """

    def __init__(self, pipeline: Step1XEditPipeline, model: str, model_hash: str) -> None:
        self.pipeline = pipeline
        self.model = model
        self.model_hash = model_hash
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, model: str = DEFAULT_MODEL, runtime: RuntimeConfig | None = None) -> "Editor":
        """Load a model.

        Args:
            model: A name of the catalogue, a diffusers-layout folder, or a hub repository.
            runtime: Precision, device, threads, where weights wait.

        Raises:
            InvalidRequest: The model is unknown, or the device is not there.
            CheckpointError: Its files are not what they should be.
        """
        runtime = runtime or RuntimeConfig.checked()
        location = locate(model)
        folder = Path(location)
        if not folder.is_dir():
            folder = _download(location)
        pipeline = load_pipeline(folder, runtime).pipeline
        return cls(pipeline, model, weights_hash(folder, runtime.weights))

    def edit(self, request: EditRequest, on_progress: Progress | None = None) -> EditResult:
        """Edit a picture, or draw one where the request has none.

        Args:
            request: What to do.
            on_progress: Called after each step.

        Raises:
            InvalidRequest: The picture, the mask or the instruction cannot be used.
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

        output: Any = self.pipeline(
            image=None if picture is None else picture.on_white,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
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
            negative_prompt=request.negative_prompt,
            seed=seed,
            num_steps=settings["num_inference_steps"],
            guidance=settings["guidance_scale"],
            size_level_px=settings["size_level"],
            keep=request.keep,
            width=width,
            height=height,
            source_sha256=None if picture is None else picture.sha256,
            source_name=None if picture is None else picture.name,
            mask_sha256=None if mask is None else hashlib.sha256(mask.tobytes()).hexdigest(),
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
            "size_level": request.size_level_px or own["size_level"],
            "width": request.width,
            "height": request.height,
        }


def _open(request: EditRequest) -> tuple[images.Picture | None, Image.Image | None]:
    """The picture and the mask of a request, where it has them."""
    if request.image is None:
        return None, None
    picture = images.open_picture(request.image, max_pixels=request.max_pixels)
    if request.mask is None:
        return picture, None
    return picture, images.open_mask(request.mask, picture, max_pixels=request.max_pixels)


def _download(repository: str) -> Path:
    try:
        return Path(Step1XEditPipeline.download(repository))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise CheckpointError(
            f"model {repository!r} cannot be fetched: {type(error).__name__}: {one_line(error)}"
        ) from error


def _to_pil(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
