"""Tensors of safetensors files, read one by one with plain reads.

The safetensors library maps files into memory, so that every page that was ever touched counts as
resident. Whoever loads a large model piece by piece, or streams it, reads by `TensorFiles.read`
instead: what is in memory is the tensor that was asked for.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from step1x_edit.checkpoints.contents import one_line
from step1x_edit.errors import CheckpointError
from step1x_edit.model.official_layout import transformer_rows
from step1x_edit.model.tensor_writer import DTYPES

_CHECKED_AT_ONCE = 1 << 22  # numbers
_SAMPLE_BYTES = 1 << 12


class Place(NamedTuple):
    """Where a tensor's bytes are."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    halves_swapped: bool = False
    """Whether the second half of its rows comes first in the file."""

    @property
    def num_bytes(self) -> int:
        """Length of the tensor in the file."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The tensors of a component, by name.

    Args:
        origin: The folder or the file, for messages.
        places: Tensor name → where it is.
        keep_cached: Let the system keep what was read in its page cache. Worth it where all of it
            fits beside the rest; otherwise the pages would only drive others out.
    """

    def __init__(self, origin: Path, places: dict[str, Place], *, keep_cached: bool = True) -> None:
        self.origin = origin
        self.places = places
        self.keep_cached = keep_cached
        self.bytes_read = 0
        self._sound: set[str] = set()
        """Names of what has been read before, and holds numbers only."""

    @classmethod
    def of_folder(cls, component: Path, renames: Iterable[tuple[str, str]] = ()) -> "TensorFiles":
        """Open a component folder.

        Args:
            component: Folder of safetensors files.
            renames: Pairs of a regular expression and what replaces it, applied in order to each
                name.

        Raises:
            CheckpointError: There is no file, or one is broken, or two hold the same tensor.
        """
        files = sorted(component.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{component} holds no safetensors file: the model folder is incomplete"
            )
        places: dict[str, Place] = {}
        for file in files:
            for name, place in read_places(file).items():
                for pattern, replacement in renames:
                    name = re.sub(pattern, replacement, name)
                if name in places:
                    raise CheckpointError(f"{file}: {name} is in {places[name].file.name} as well")
                places[name] = place
        return cls(component, places)

    @classmethod
    def of_official(cls, path: Path, shapes: Mapping[str, Sequence[int]]) -> "TensorFiles":
        """Open an official transformer file under our names.

        Args:
            path: The file.
            shapes: Shape of each parameter of the transformer.

        Raises:
            CheckpointError: The file is broken.
        """
        found = read_places(path)
        places: dict[str, Place] = {}
        for row in transformer_rows(shapes):
            place = found.pop(row.official, None)
            if place is None:
                continue
            heights = [shapes[name][0] for name in row.ours]
            if place.shape[:1] != (sum(heights),):  # of another model, which is seen by its shape
                places[row.ours[0]] = place
                continue
            offset = place.offset
            for name, height in zip(row.ours, heights, strict=True):
                swapped = row.rule == "swap_halves"
                piece = Place(path, offset, place.dtype, (height, *place.shape[1:]), swapped)
                places[name] = piece
                offset += piece.num_bytes
        return cls(path, places | found)

    @property
    def num_bytes(self) -> int:
        """Length of all tensors."""
        return sum(place.num_bytes for place in self.places.values())

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor as the file has it, or some of its rows.

        Args:
            name: A key of `places`.
            rows: Along the first axis, without a step; all by default. Not where halves are
                swapped.

        Raises:
            CheckpointError: The file ends early, or what is read for the first time is not finite.
        """
        file, offset, dtype, shape, swapped = self.places[name]
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            offset += start * prod(shape[1:]) * dtype.itemsize
            shape = (stop - start, *shape[1:])
        tensor = torch.empty(shape, dtype=dtype)
        self._fill(tensor.flatten().view(torch.uint8), file, offset)
        if name not in self._sound:
            check_finite(name, tensor, file)
            if rows is None:
                self._sound.add(name)
        return torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor

    def fingerprint(self) -> str:
        """A hash that changes with any tensor, of the beginning, middle and end of each."""
        digest = hashlib.sha256()
        for name, place in sorted(self.places.items()):
            digest.update(f"{name} {place.dtype} {place.shape}".encode())
            length = min(_SAMPLE_BYTES, place.num_bytes)
            for start in (0, (place.num_bytes - length) // 2, place.num_bytes - length):
                sample = torch.empty(length, dtype=torch.uint8)
                self._fill(sample, place.file, place.offset + start)
                digest.update(sample.numpy().tobytes())
        return digest.hexdigest()

    def _fill(self, target: Tensor, file: Path, offset: int) -> None:
        values: Any = target.numpy()
        view = memoryview(values)
        number = os.open(file, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(number, [view[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{file} ends early: get it again")
                done += count
            if not self.keep_cached:
                os.posix_fadvise(number, offset, len(view), os.POSIX_FADV_DONTNEED)
        finally:
            os.close(number)
        self.bytes_read += len(view)


def check_finite(name: str, tensor: Tensor, origin: str | Path) -> None:
    """Refuse a weight that is not finite: a picture made with it is black, and nothing says why.

    Args:
        name: The tensor's, for the message.
        tensor: Is read once; whole numbers pass.
        origin: The file or folder that it was read from.

    Raises:
        CheckpointError: It holds NaN or infinite values.
    """
    if not tensor.is_floating_point():
        return
    for part in tensor.detach().flatten().split(_CHECKED_AT_ONCE):
        # The extremes show both in one pass without a copy; fp8 has no such kernel.
        values = part if part.element_size() > 1 else part.to(torch.bfloat16)
        if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
            raise CheckpointError(
                f"{origin}: the tensor {name} holds NaN or infinite values: the file is damaged, "
                "get it again"
            )


def read_places(file: Path) -> dict[str, Place]:
    """Where the tensors of a safetensors file are, from its header.

    Raises:
        CheckpointError: Not a whole safetensors file.
    """
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size)) if size < file.stat().st_size else None
        if not isinstance(header, dict):
            raise ValueError("no header")
        header.pop("__metadata__", None)
        places = {
            name: Place(
                file,
                8 + size + entry["data_offsets"][0],
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({one_line(error)}): get it again") from error
    end = max((place.offset + place.num_bytes for place in places.values()), default=0)
    if end != file.stat().st_size:
        raise CheckpointError(
            f"{file} has {file.stat().st_size} bytes instead of {end}: get it again"
        )
    return places
