"""Materials: a drawing repainted as if it were made of something.

The drawing's form is guessed from its outline (a dome: the square root of the distance to the rim)
and its shading; light from the upper left then gives every material its gloss. Called by `scene`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from step1x_edit.datagen.backgrounds import noise

Sprite = Float[np.ndarray, "h w 4"]
Plane = Float[np.ndarray, "h w"]
LIGHT = np.asarray([-0.45, -0.6, 0.66], np.float32)
"""Towards the lamp: left, up, and out of the picture."""
GRAIN_SEED = 11


@dataclass(frozen=True)
class Surface:
    """What a material is computed from, for every pixel of a drawing."""

    lightness: Plane
    """The drawing's own, stretched to [0, 1]."""
    diffuse: Plane
    """Cosine between surface and light, at least 0."""
    gloss: Plane
    """Blinn-Phong highlight in [0, 1]."""
    tilt: Plane
    """Height of the surface's normal, -1 (down) to 1 (up)."""
    rim: Plane
    """1 at the outline, 0 where the surface faces the viewer."""
    grain: Plane
    """Fractal noise in [0, 1]."""


class Material(NamedTuple):
    """One nameable material."""

    en: str
    """As in "make it of …"."""
    zh: str
    paint: Callable[[Surface], Float[np.ndarray, "h w 3"]]
    opacity: Callable[[Surface], Plane] | None = None
    """Share of the drawing's own opacity; None is all of it."""


def made_of(sprite: Sprite, material: str) -> Sprite:
    """Repaint a drawing; `material` is a key of `MATERIALS`."""
    surface = _surface(sprite)
    entry = MATERIALS[material]
    alpha = sprite[..., 3]
    if entry.opacity is not None:
        alpha = alpha * entry.opacity(surface)
    painted = np.concatenate([entry.paint(surface), alpha[..., None]], -1)
    return painted.clip(0, 1).astype(np.float32)


def _surface(sprite: Sprite) -> Surface:
    light = sprite[..., :3] @ np.asarray([0.299, 0.587, 0.114], np.float32)
    inside = sprite[..., 3] > 0.5
    low, high = np.quantile(light[inside], [0.02, 0.98]) if inside.any() else (0.0, 1.0)
    lightness = ((light - low) / max(float(high - low), 0.05)).clip(0, 1).astype(np.float32)
    distance = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]  # pyright: ignore[reportOptionalSubscript, reportIndexIssue, reportArgumentType, reportCallIssue] - an array
    unit = max(sprite.shape[:2]) / 40
    height = np.sqrt(distance * unit) * 3 + 2.2 * unit * ndimage.gaussian_filter(lightness, unit)
    rows, columns = np.gradient(ndimage.gaussian_filter(height, 1.3 * unit))
    normal = np.stack([-columns, -rows, np.full_like(rows, 1.1)], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    halfway = LIGHT + np.asarray([0, 0, 1], np.float32)
    halfway /= np.linalg.norm(halfway)
    rng = np.random.default_rng(GRAIN_SEED)
    return Surface(
        lightness,
        (normal @ LIGHT).clip(0),
        (normal @ halfway).clip(0) ** 24,
        -normal[..., 1],
        1 - normal[..., 2],
        noise(rng, sprite.shape[1], sprite.shape[0], 4),
    )


def _ramp(at: Plane, *stops: tuple[float, float, float]) -> Float[np.ndarray, "h w 3"]:
    """Colours evenly spaced over [0, 1]."""
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(at, places, [stop[c] for stop in stops]) for c in range(3)], -1)


def _shine(surface: Surface, strength: float) -> Float[np.ndarray, "h w 1"]:
    return strength * surface.gloss[..., None]


def _gold(s: Surface) -> np.ndarray:
    at = 0.35 * s.lightness + 0.55 * s.diffuse + 0.12 * np.sin(6 * s.tilt)
    return _ramp(at, (0.28, 0.13, 0.02), (0.80, 0.52, 0.10), (1.0, 0.84, 0.30)) + _shine(s, 0.6)


def _silver(s: Surface) -> np.ndarray:
    at = 0.35 * s.lightness + 0.5 * s.diffuse + 0.2 * np.sin(7 * s.tilt)
    return _ramp(at, (0.16, 0.17, 0.20), (0.62, 0.65, 0.69), (0.94, 0.95, 0.97)) + _shine(s, 0.6)


def _wood(s: Surface) -> np.ndarray:
    rows = np.arange(s.grain.shape[0])[:, None] / s.grain.shape[0]
    rings = 0.5 + 0.5 * np.sin(34 * (rows + 0.35 * s.grain))
    shade = 0.45 + 0.3 * s.diffuse + 0.35 * s.lightness
    return _ramp(rings, (0.42, 0.25, 0.12), (0.72, 0.48, 0.26)) * shade[..., None]


def _stone(s: Surface) -> np.ndarray:
    at = 1.1 * (s.grain - 0.5) + 0.4 * s.lightness + 0.55 * s.diffuse
    return _ramp(at, (0.18, 0.18, 0.18), (0.55, 0.54, 0.52), (0.80, 0.79, 0.76))


def _glass(s: Surface) -> np.ndarray:
    return _ramp(1 - s.rim, (0.30, 0.55, 0.62), (0.88, 0.97, 1.0)) + _shine(s, 0.9)


def _chocolate(s: Surface) -> np.ndarray:
    at = 0.5 * s.lightness + 0.5 * s.diffuse
    return _ramp(at, (0.13, 0.06, 0.03), (0.33, 0.17, 0.09), (0.52, 0.30, 0.18)) + _shine(s, 0.35)


def _marble(s: Surface) -> np.ndarray:
    veins = np.abs(np.sin(9 * s.grain + 4 * s.tilt)) ** 0.35
    shade = 0.62 + 0.2 * s.diffuse + 0.2 * s.lightness
    return _ramp(veins, (0.45, 0.46, 0.50), (0.98, 0.97, 0.95)) * shade[..., None] + _shine(s, 0.25)


MATERIALS: dict[str, Material] = {
    "gold": Material("gold", "黄金", _gold),
    "silver": Material("silver", "银", _silver),
    "wood": Material("wood", "木头", _wood),
    "stone": Material("stone", "石头", _stone),
    "glass": Material("glass", "玻璃", _glass, lambda s: 0.35 + 0.5 * s.rim + 0.5 * s.gloss),
    "chocolate": Material("chocolate", "巧克力", _chocolate),
    "marble": Material("marble", "大理石", _marble),
}
