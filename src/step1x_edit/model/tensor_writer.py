"""Write safetensors files with one tensor in memory at a time.

The safetensors library wants all tensors at once, which for a model would be a second copy of it;
its format is a length, a JSON header and the bytes. `official_layout` and `runtime.convert` write
through here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""The format's names of what a weights file may hold."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    path: Path,
    entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file; it appears under its name only when it is whole.

    Args:
        path: Target; replaced if it exists.
        entries: Tensor name → dtype and shape, in the order in which they are written.
        make: Gives the tensor of a name.
        metadata: Strings for the file's header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in entries.items():
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": [*shape],
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to eight bytes
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for name, (dtype, shape) in entries.items():
                tensor = make(name)
                assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), name
                file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
