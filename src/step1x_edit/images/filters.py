"""Smoothing and gradients of model-size pictures, and the one place that imports scipy."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

Pixels = Float32[np.ndarray, "h w 3"]
Field = Float32[np.ndarray, "h w"]
Region = Bool[np.ndarray, "h w"]

FINE_PX = 1.0
GRADIENT_PX = 0.7
EIGHT_NEIGHBOURS = np.ones((3, 3), bool)


def ndimage() -> Any:
    """``scipy.ndimage``: half a second to import, and too loosely typed for pyright to follow."""
    from scipy import ndimage as module

    return module


def smooth(field: np.ndarray, sigma_px: float = FINE_PX) -> np.ndarray:
    """Gaussian blur along the first two axes."""
    sigmas = (sigma_px, sigma_px) + (0,) * (field.ndim - 2)
    return ndimage().gaussian_filter(field, sigmas, mode="nearest")


def gradient(picture: Pixels) -> tuple[Pixels, Pixels]:
    """Derivatives of a lightly smoothed picture, downwards and to the right."""
    down, right = np.gradient(smooth(picture, GRADIENT_PX), axis=(0, 1))
    return down, right
