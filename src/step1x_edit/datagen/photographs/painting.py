"""Parts that paint with a pipeline of diffusers: fill-inpainting, and painting over a given depth.

Each is loaded from a folder, or from the hub by its id, which downloads it.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from step1x_edit.datagen.backgrounds import Picture
from step1x_edit.datagen.photographs.neural import loaded, short_name
from step1x_edit.datagen.photographs.roles import Mask

EMPTY = "an empty background, nothing in the foreground"
"""Asked of a hole that an object leaves."""


class FillPainter:
    """Paints into a mask: FLUX.1 Fill, or any other inpainting pipeline of diffusers.

    It is a `roles.Painter`, and with a fixed prompt a `roles.Inpainter`.

    Args:
        model: Folder or hub id of a pipeline.
        num_steps: Denoising steps.
        guidance: How strongly the prompt binds; FLUX.1 Fill wants about 30.
        device: Where it runs, as torch names it.
        dtype: Of the weights, as torch names it.
    """

    def __init__(
        self, model: str, num_steps: int = 28, guidance: float = 30.0, device: str = "cpu",
        dtype: str = "bfloat16",
    ) -> None:  # fmt: skip
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        self.name, self.num_steps, self.guidance = short_name(model), num_steps, guidance
        self._pipeline = _pipeline(DiffusionPipeline, model, device, dtype)

    def paint(self, picture: Picture, where: Mask, prompt: str, seed: int) -> Picture:
        """See `roles.Painter`."""
        painted = _run(
            self._pipeline, picture.shape[:2], seed, prompt=prompt,
            image=Image.fromarray(picture), mask_image=Image.fromarray(where),
            num_inference_steps=self.num_steps, guidance_scale=self.guidance,
        )  # fmt: skip
        return np.where(where[..., None], painted, picture)

    def fill(self, picture: Picture, hole: Mask) -> Picture:
        """See `roles.Inpainter`."""
        return self.paint(picture, hole, EMPTY, seed=0)


class FluxDepthPainter:
    """Paints a picture of a given depth (FLUX.1 Depth): a `roles.DepthPainter`.

    Args:
        model: Folder or hub id of a pipeline.
        num_steps: Denoising steps.
        guidance: How strongly the prompt binds; FLUX.1 Depth wants about 10.
        device: Where it runs, as torch names it.
        dtype: Of the weights, as torch names it.
    """

    def __init__(
        self, model: str, num_steps: int = 28, guidance: float = 10.0, device: str = "cpu",
        dtype: str = "bfloat16",
    ) -> None:  # fmt: skip
        from diffusers.pipelines.flux.pipeline_flux_control import FluxControlPipeline

        self.name, self.num_steps, self.guidance = short_name(model), num_steps, guidance
        self._pipeline = _pipeline(FluxControlPipeline, model, device, dtype)

    def paint(self, depth: Float[np.ndarray, "height width"], prompt: str, seed: int) -> Picture:
        """See `roles.DepthPainter`."""
        grey = Image.fromarray((depth * 255).astype(np.uint8)).convert("RGB")
        return _run(
            self._pipeline, depth.shape, seed, prompt=prompt, control_image=grey,
            num_inference_steps=self.num_steps, guidance_scale=self.guidance,
        )  # fmt: skip


def _pipeline(kind: Any, model: str, device: str, dtype: str) -> Any:
    pipeline = loaded(kind, model, dtype=getattr(torch, dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _run(pipeline: Any, size: tuple[int, ...], seed: int, **inputs: Any) -> Picture:
    """One picture of `size` (height, width); the noise is drawn on the CPU."""
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    made = pipeline(height=height, width=width, generator=generator, **inputs).images[0]
    return np.asarray(made.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
