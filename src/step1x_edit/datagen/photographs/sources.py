"""Where the pictures of a run come from: photographs, pairs of frames, and videos. For `run`."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from step1x_edit.datagen.photographs.classical import load_cv2
from step1x_edit.errors import InvalidRequest
from step1x_edit.images.read import open_picture

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
GAP_S = 1.0
"""Between the two frames of a video that make a pair."""


@runtime_checkable
class Source(Protocol):
    """One photograph, or two frames."""

    @property
    def name(self) -> str:
        """In the labels and the records."""
        ...

    def pictures(self) -> tuple[Image.Image, ...]:
        """One or two RGB pictures.

        Raises:
            InvalidRequest: A file cannot be read.
        """
        ...


@dataclass(frozen=True)
class Still:
    """A photograph."""

    name: str
    path: Path

    def pictures(self) -> tuple[Image.Image, ...]:
        """See `Source`."""
        return (_opened(self.path),)


@dataclass(frozen=True)
class Pair:
    """A folder with two frames, named after the folder."""

    name: str
    paths: tuple[Path, Path]

    def pictures(self) -> tuple[Image.Image, ...]:
        """See `Source`."""
        return tuple(map(_opened, self.paths))


@dataclass(frozen=True)
class Moment:
    """Two frames of a video, `GAP_S` apart, named after the video."""

    name: str
    path: Path
    at_s: float

    def pictures(self) -> tuple[Image.Image, ...]:
        """See `Source`."""
        cv2 = load_cv2()
        video = cv2.VideoCapture(str(self.path))
        frames = []
        try:
            for at_s in (self.at_s, self.at_s + GAP_S):
                video.set(cv2.CAP_PROP_POS_MSEC, 1000 * at_s)
                read, frame = video.read()
                if not read:
                    raise InvalidRequest(f"{self.path} cannot be read at {at_s:.1f} s")
                frames.append(Image.fromarray(np.ascontiguousarray(frame[..., ::-1])))
        finally:
            video.release()
        return tuple(frames)


def sources_in(folder: Path) -> list[Source]:
    """What a folder and the folders in it hold, in order of the names.

    A sub-folder with just two pictures is a pair of frames.

    Raises:
        InvalidRequest: There is no such folder, or it holds neither photographs nor videos.
    """
    if not folder.is_dir():
        raise InvalidRequest(f"{folder}: no such folder: give one with photographs")
    groups: dict[Path, list[Path]] = {}
    sources: list[Source] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES and path.is_file():
            groups.setdefault(path.parent, []).append(path)
        elif path.suffix.lower() in VIDEOS and path.is_file():
            sources += _moments(path, path.relative_to(folder).as_posix())
    for parent, paths in groups.items():
        if len(paths) == 2 and parent != folder:
            sources.append(Pair(parent.relative_to(folder).as_posix(), (paths[0], paths[1])))
        else:
            sources += [Still(path.relative_to(folder).as_posix(), path) for path in paths]
    if not sources:
        raise InvalidRequest(
            f"{folder} holds no photographs ({', '.join(PICTURES)}) and no videos "
            f"({', '.join(VIDEOS)})"
        )
    return sources


def _moments(path: Path, name: str) -> list[Source]:
    """One a second; the first one stands for a video of unknown length."""
    cv2 = load_cv2()
    video = cv2.VideoCapture(str(path))
    try:
        rate, count = video.get(cv2.CAP_PROP_FPS), video.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        video.release()
    length_s = count / rate if rate > 0 else 0.0
    return [Moment(name, path, at_s) for at_s in np.arange(0, max(length_s - GAP_S, GAP_S), GAP_S)]


@lru_cache(8)
def _opened(path: Path) -> Image.Image:
    return open_picture(path).rgb
