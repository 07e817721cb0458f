"""Backgrounds: views of panoramas, crops of photographs, and procedural ones.

`NAMED` backgrounds look the same whenever they are named (a background change must say what it
wants); `sample` draws from an unbounded set for the source pictures. Called by `scene`.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from step1x_edit.datagen.atlas import PANORAMAS, Atlas
from step1x_edit.datagen.vocabulary import COLOURS

Pixels = Float[np.ndarray, "height width 3"]
"""sRGB in [0, 1]."""
Picture = UInt8[np.ndarray, "height width 3"]
Source = Float[np.ndarray, "source_height source_width 3"]
"""A picture that another one of another size is taken from."""


PROCEDURAL = "procedural"
"""Source of a background that was made from no art."""


class Background(NamedTuple):
    """A background of a picture's size."""

    pixels: Pixels
    name: str | None
    """Key of `NAMED`, or None."""
    source: str
    """The art behind it, as ``folder/name`` of the atlas, or `PROCEDURAL`."""


class NamedBackground(NamedTuple):
    """A background that an instruction can ask for."""

    zh: str
    draw: Callable[[Atlas, int, int], Pixels]
    """(atlas, width, height) → sRGB in [0, 1]."""
    source: str = PROCEDURAL


def perspective(
    panorama: Source, width: int, height: int, yaw: float, pitch: float, fov: float
) -> Pixels:
    """A pinhole view into an equirectangular panorama, bilinear.

    Args:
        panorama: The panorama, 360° wide and 180° high.
        width: Width of the view in pixels.
        height: Height of the view in pixels.
        yaw: Heading of the view's centre in degrees.
        pitch: Elevation of the view's centre in degrees, up is positive.
        fov: Horizontal field of view in degrees.
    """
    focal = 0.5 * width / np.tan(np.radians(fov) / 2)
    x = np.arange(width, dtype=np.float32) - width / 2 + 0.5
    y = np.arange(height, dtype=np.float32)[:, None] - height / 2 + 0.5
    cos, sin = np.cos(np.radians(pitch)), np.sin(np.radians(pitch))
    up, forward = -y * cos + focal * sin, y * sin + focal * cos
    longitude = np.arctan2(x, forward) + np.radians(yaw)
    latitude = np.arctan2(up, np.hypot(x, forward))
    rows, columns = panorama.shape[:2]
    u = (longitude / (2 * np.pi)) % 1 * columns
    v = (0.5 - latitude / np.pi) * (rows - 1)
    return bilinear(panorama, u, v)


def bilinear(
    pixels: Source, u: Float[np.ndarray, "height width"], v: Float[np.ndarray, "height width"]
) -> Pixels:
    """Sample `pixels` at columns `u` (wrapping) and rows `v` (clamped)."""
    rows, columns = pixels.shape[:2]
    u0, v0 = np.floor(u).astype(np.intp), np.floor(v).astype(np.intp)
    fu, fv = (u - u0)[..., None].astype(np.float32), (v - v0)[..., None].astype(np.float32)
    left, right = u0 % columns, (u0 + 1) % columns
    top, bottom = v0.clip(0, rows - 1) * columns, (v0 + 1).clip(0, rows - 1) * columns
    flat = pixels.reshape(-1, 3)

    def row(start: np.ndarray) -> Pixels:
        before = flat.take(start + left, 0)
        return before + fu * (flat.take(start + right, 0) - before)

    upper = row(top)
    return upper + fv * (row(bottom) - upper)


def noise(
    rng: np.random.Generator, width: int, height: int, octaves: int = 4
) -> Float[np.ndarray, "height width"]:
    """Fractal value noise in [0, 1]: each octave doubles the frequency and halves the weight."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        cells = 2 ** (octave + 1) + 1
        grid = rng.random((cells, cells), np.float32)
        rows = np.linspace(0, cells - 1, height, dtype=np.float32)
        columns = np.linspace(0, cells - 1, width, dtype=np.float32)
        r, c = np.minimum(rows.astype(int), cells - 2), np.minimum(columns.astype(int), cells - 2)
        fr, fc = (rows - r)[:, None], (columns - c)[None]
        top = grid[r][:, c] * (1 - fc) + grid[r][:, c + 1] * fc
        bottom = grid[r + 1][:, c] * (1 - fc) + grid[r + 1][:, c + 1] * fc
        total += (top * (1 - fr) + bottom * fr) / 2**octave
    return total / (2 - 2 ** (1 - octaves))


def vertical(
    *stops: tuple[float, tuple[float, float, float]],
) -> Callable[[Atlas, int, int], Pixels]:
    """A drawer of a vertical gradient through (height fraction from the top, colour) stops."""
    at, colours = [s[0] for s in stops], np.asarray([s[1] for s in stops], np.float32)

    def draw(_: Atlas, width: int, height: int) -> Pixels:
        y = (np.arange(height) + 0.5) / height
        column = np.stack([np.interp(y, at, colours[:, c]) for c in range(3)], -1).astype(
            np.float32
        )
        return np.repeat(column[:, None], width, 1)

    return draw


def _rgb(*channels: float) -> Float[np.ndarray, "3"]:
    return np.asarray(channels, np.float32)


def _plain(rgb: tuple[float, float, float]) -> Callable[[Atlas, int, int], Pixels]:
    return lambda _, width, height: np.broadcast_to(_rgb(*rgb), (height, width, 3)).copy()


def _of_panorama(
    zh: str, name: str, yaw: float, pitch: float = 0, fov: float = 90
) -> NamedBackground:
    def draw(atlas: Atlas, width: int, height: int) -> Pixels:
        return perspective(atlas.panorama(name), width, height, yaw, pitch, fov)

    return NamedBackground(zh, draw, f"panoramas/{name}")


def _starry_night(_: Atlas, width: int, height: int) -> Pixels:
    sky = vertical((0, (0.02, 0.03, 0.12)), (0.8, (0.10, 0.10, 0.32)), (1, (0.02, 0.03, 0.08)))(
        _, width, height
    )
    rng = np.random.default_rng(7)
    for x, y, size in rng.random((60, 3)):
        row, column = int(y * 0.8 * height), int(x * width)
        reach = max(1, round((0.4 + size) * min(width, height) / 128))
        sky[row : row + reach, column : column + reach] = 0.75 + 0.25 * size
    return sky


def _snowy_mountains(_: Atlas, width: int, height: int) -> Pixels:
    picture = vertical((0, (0.35, 0.60, 0.92)), (0.7, (0.80, 0.90, 0.98)), (1, (0.9, 0.95, 1)))(
        _, width, height
    )
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    for peak, top, slope, rgb in (
        (0.25, 0.30, 1.1, (0.40, 0.45, 0.58)),
        (0.72, 0.22, 1.2, (0.30, 0.34, 0.47)),
    ):
        ridge = top + slope * np.abs(x - peak)
        picture[y > ridge] = rgb
        picture[(y > ridge) & (y < ridge + 0.13 * np.clip(1 - 2 * np.abs(x - peak), 0, 1))] = (
            0.96,
            0.97,
            1,
        )
    picture[y > 0.82] = (0.93, 0.95, 0.98)
    return picture


def _bricks(_: Atlas, width: int, height: int) -> Pixels:
    unit = min(width, height) / 8
    x, y = np.meshgrid(np.arange(width) / unit, np.arange(height) / unit)
    row = np.floor(y)
    across = (x / 2 + 0.5 * (row % 2)) % 1
    mortar = (y % 1 < 0.14) | (across < 0.07)
    return np.where(mortar[..., None], _rgb(0.80, 0.77, 0.72), _rgb(0.65, 0.27, 0.20))


def _checkerboard(_: Atlas, width: int, height: int) -> Pixels:
    unit = min(width, height) / 4
    x, y = np.meshgrid(np.arange(width) // unit, np.arange(height) // unit)
    return np.where(
        ((x + y) % 2 == 0)[..., None],
        _rgb(0.92, 0.92, 0.92),
        _rgb(0.25, 0.25, 0.28),
    )


NAMED: dict[str, NamedBackground] = {
    "a forest": _of_panorama("森林", "forest", 20),
    "a city street": _of_panorama("城市街道", "city", 12, 6),
    "a green meadow": _of_panorama("绿色草地", "park", 60, -4),
    "a living room": _of_panorama("客厅", "apartment", 55, -6, 100),
    "a rocky desert": _of_panorama("岩石荒漠", "dawn", 150, -8),
    "a cloudy sky": _of_panorama("多云的天空", "sky", 180, 22),
    "a field at sunrise": _of_panorama("日出的田野", "sunrise", 120, 0),
    "a warehouse": _of_panorama("仓库", "warehouse", 0, 0),
    "a workshop": _of_panorama("车间", "workshop", 180, -4),
    "an old square": _of_panorama("古老的广场", "sunset", -80, 4),
    "a beach": NamedBackground(
        "海滩",
        vertical(
            (0, (0.35, 0.65, 0.95)), (0.40, (0.75, 0.90, 1.0)), (0.42, (0.05, 0.45, 0.70)),
            (0.62, (0.25, 0.70, 0.80)), (0.66, (0.95, 0.86, 0.64)), (1, (0.88, 0.76, 0.50)),
        ),
    ),
    "a sunset": NamedBackground(
        "日落",
        vertical(
            (0, (0.22, 0.12, 0.38)), (0.35, (0.80, 0.30, 0.38)), (0.62, (1.0, 0.68, 0.28)),
            (0.66, (0.30, 0.14, 0.22)), (1, (0.12, 0.06, 0.14)),
        ),
    ),
    "a starry night": NamedBackground("星空", _starry_night),
    "snowy mountains": NamedBackground("雪山", _snowy_mountains),
    "a brick wall": NamedBackground("砖墙", _bricks),
    "a checkerboard": NamedBackground("棋盘格", _checkerboard),
} | {
    f"a plain {name} wall": NamedBackground(f"纯{entry.zh}的墙", _plain(entry.rgb))
    for name, entry in COLOURS.items()
}  # fmt: skip


def named(name: str, atlas: Atlas, width: int, height: int) -> Background:
    """The background of `NAMED` that an instruction asks for."""
    return Background(_named_pixels(name, atlas, width, height), name, NAMED[name].source)


@lru_cache(maxsize=32)
def _named_pixels(name: str, atlas: Atlas, width: int, height: int) -> Pixels:
    """Always the same, so drawn once and not to be written to."""
    pixels = NAMED[name].draw(atlas, width, height)
    pixels.setflags(write=False)
    return pixels


def sample(rng: np.random.Generator, atlas: Atlas, width: int, height: int) -> Background:
    """A random background for a source picture."""
    kind = rng.random()
    if kind < 0.28:
        return named(str(rng.choice(list(NAMED))), atlas, width, height)
    if kind < 0.68:
        yaw, pitch, fov = rng.uniform(0, 360), rng.uniform(-22, 22), rng.uniform(55, 100)
        source = str(rng.choice(PANORAMAS))
        picture = perspective(atlas.panorama(source), width, height, yaw, pitch, fov)
        source = f"panoramas/{source}"
    elif kind < 0.80:
        source = str(rng.choice(atlas.photograph_names))
        picture = _photograph_crop(rng, atlas.photograph(source), width, height)
        source = f"photographs/{source}"
    else:
        return Background(_procedural(rng, width, height), None, PROCEDURAL)
    gain = rng.uniform(0.75, 1.2) * rng.uniform(0.92, 1.08, 3)
    picture = (picture ** rng.uniform(0.75, 1.35) * gain.astype(np.float32)).clip(0, 1)
    return Background(picture[:, ::-1] if rng.random() < 0.5 else picture, None, source)


def _photograph_crop(
    rng: np.random.Generator, photograph: Source, width: int, height: int
) -> Pixels:
    rows, columns = photograph.shape[:2]
    furthest = min(rows / height, columns / width, 3)
    zoom = rng.uniform(1, furthest) if furthest > 1 else 1
    top = rng.uniform(0, max(rows - zoom * height, 1))
    left = rng.uniform(0, max(columns - zoom * width, 1))
    return shrunk_crop(photograph, top, left, zoom, width, height)


def shrunk_crop(
    photograph: Source, top: float, left: float, zoom: float, width: int, height: int
) -> Pixels:
    """Part of a photograph, `zoom` times as large as the result, smoothed where pixels drop out."""
    u, v = np.meshgrid(left + zoom * np.arange(width), top + zoom * np.arange(height))
    u = u.clip(0, photograph.shape[1] - 1)
    if zoom < 1.5:
        return bilinear(photograph, u, v)
    reach = round(zoom)
    row, column = max(int(top) - reach, 0), max(int(left) - reach, 0)
    near = photograph[row : int(v.max()) + reach + 2, column : int(u.max()) + reach + 2]
    smooth = ndimage.uniform_filter(near, (reach, reach, 1))  # pyright: ignore[reportArgumentType] - scipy takes a size per axis
    return bilinear(smooth, u - column, v - row)


def _procedural(rng: np.random.Generator, width: int, height: int) -> Pixels:
    low, high = rng.random((2, 3), np.float32)
    kind = rng.integers(4)
    if kind == 0:
        blend = noise(rng, width, height, int(rng.integers(2, 6)))
    elif kind == 1:
        blend = np.linspace(0, 1, height, dtype=np.float32)[:, None].repeat(width, 1)
    else:
        angle, period = rng.uniform(0, np.pi), rng.uniform(0.08, 0.5) * min(width, height)
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        phase = (x * np.cos(angle) + y * np.sin(angle)) / period
        blend = (
            (phase % 1 < 0.5).astype(np.float32)
            if kind == 2
            else 0.5 + 0.5 * np.sin(2 * np.pi * phase)
        )
    return (low + (high - low) * blend[..., None]).astype(np.float32)
