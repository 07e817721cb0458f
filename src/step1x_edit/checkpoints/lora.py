"""LoRA files beside a model: do they fit it, and which are they. From headers, without torch.

The doors check with it before a model is loaded; `Editor` and `apps.batch` put what `applied` says
into a picture's provenance.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from step1x_edit.checkpoints.contents import one_line
from step1x_edit.errors import CheckpointError
from step1x_edit.model.lora_layouts import check_fit, layer_of, read_header
from step1x_edit.request import AppliedLora, LoraChoice

_CHUNK_BYTES = 1 << 20


def applied(choices: Sequence[LoraChoice]) -> tuple[AppliedLora, ...]:
    """Which files these are, by name and content.

    Raises:
        CheckpointError: One cannot be read.
    """
    return tuple(
        AppliedLora(name=choice.file.name, sha256=_sha256(choice.file)[:12], weight=choice.weight)
        for choice in choices
    )


def check_loras(choices: Sequence[LoraChoice], transformer: Path | None) -> None:
    """Refuse what is no LoRA of Step1X-Edit, or none of this model.

    Args:
        choices: What is to be put on.
        transformer: The model's transformer, a folder or an official file; None where it is not on
            this machine yet. Packed weights are looked into when the model is loaded.

    Raises:
        CheckpointError: Naming the file, and the layers that do not fit.
    """
    for choice in choices:
        header = read_header(choice.file)
        if transformer is not None:
            sizes = _layer_sizes(transformer)
            if sizes:
                check_fit(header, sizes)


def _layer_sizes(component: Path) -> dict[str, tuple[int, int]]:
    """Our layer name → rows and columns of every matrix in a component; empty if packed."""
    sizes: dict[str, tuple[int, int]] = {}
    is_official = component.is_file()
    for file in [component] if is_official else sorted(component.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    part = opened.get_slice(name)
                    if part.get_dtype() == "U8":
                        return {}
                    shape = part.get_shape()
                    if name.endswith(".weight") and len(shape) == 2:
                        layer = name.removesuffix(".weight")
                        size = (shape[0], shape[1])
                        sizes |= _our_sizes(layer, size) if is_official else {layer: size}
        except (OSError, SafetensorError) as error:
            what = one_line(error)
            raise CheckpointError(f"{file} cannot be read ({what}): get it again") from error
    return sizes


def _our_sizes(official: str, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Sizes of the layers of ours that an official one holds."""
    layer = layer_of(official, "kohya")
    if layer is None:
        return {official: size}
    rows, columns = size
    # Query, key and value are square, and what may follow them takes the rest.
    *square, last = layer.ours
    sizes = dict.fromkeys(square, (columns, columns))
    return sizes | {last: (rows - columns * len(square), columns)}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); give another") from error
    return digest.hexdigest()
