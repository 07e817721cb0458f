"""What model files hold, read from their headers alone: quick for any size, and without torch.

Called by `resolve`, by the strict loader (`folder`), and by the doors, which refuse a wrong folder
before they pay for importing the networks.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from step1x_edit.errors import CheckpointError
from step1x_edit.model.config import own_sampling

WEIGHT_COMPONENTS = ("transformer", "text_encoder", "vae")
"""Folders of a model that hold weights."""

V1P2 = "v1p2"
"""A release that is recognised, and cannot be run."""

_SAMPLE_BYTES = 1 << 16
_FAMILIES = (
    ("lora", "a LoRA, which goes on top of a model"),
    ("double_blocks.", "a FLUX transformer without the connector of Step1X-Edit"),
    (".img_mod.", "a Qwen-Image transformer"),
    ("transformer_blocks.", "a transformer of another family"),
    ("encoder.", "an autoencoder"),
    ("layers.", "a language model"),
)
"""What a part of a tensor's name says of a file that is no Step1X-Edit transformer; in order."""


class TensorSummary(NamedTuple):
    """What the weights files of a component hold."""

    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    bytes: int


class ModelSettings(NamedTuple):
    """The settings a model uses where a request names none."""

    num_inference_steps: int
    guidance_scale: float
    size_level: int
    draw_size: int
    draw_negative_prompt: str


def read_index(folder: Path) -> dict[str, Any]:
    """The ``model_index.json`` of one of our model folders.

    Raises:
        CheckpointError: There is none, or it is another pipeline's.
    """
    index = _read_json(folder / "model_index.json", f"{folder} is no model folder")
    family = str(index.get("_class_name"))
    if family.startswith("Step1XEditPipelineV1P2"):
        raise CheckpointError(not_runnable(folder))
    if family != "Step1XEditPipeline":
        raise CheckpointError(
            f"{folder} holds a {family}, not a Step1XEditPipeline: give a Step1X-Edit model"
        )
    absent = [name for name in WEIGHT_COMPONENTS if not isinstance(index.get(name), list)]
    if absent:
        raise CheckpointError(
            f"{folder / 'model_index.json'} names no {' and no '.join(absent)}: get it again"
        )
    return index


def read_settings(index: dict[str, Any]) -> ModelSettings:
    """The model's own settings; those of the release where its index names none.

    Args:
        index: From `read_index`.
    """
    return ModelSettings(**own_sampling(index))


def read_version(folder: Path) -> str:
    """The release that a diffusers-layout folder follows; see `version_of`."""
    return version_of(folder / "transformer")


def version_of(transformer: Path) -> str:
    """The release that a transformer is of, told by the names of its tensors.

    Args:
        transformer: Official single file, or folder of a diffusers-layout model.

    Returns:
        "v1.0", "v1.1", or `V1P2`.

    Raises:
        CheckpointError: It is no Step1X-Edit transformer, or cannot be read.
    """
    names = read_names(transformer)
    if any("text_token_mapping" in name for name in names):
        return V1P2
    if not any(name.startswith("connector.") for name in names):
        raise CheckpointError(
            f"{transformer} is {family_of(names)}: give a Step1X-Edit transformer"
        )
    return "v1.0" if "connector.scale_factor" in names else "v1.1"


def is_official(names: Collection[str]) -> bool:
    """Whether tensors are those of an official single file, by their names."""
    heads = {name.partition(".")[0] for name in names}
    return {"connector", "double_blocks"} <= heads or "text_token_mapping" in heads


def family_of(names: Collection[str]) -> str:
    """What else a file may be, in words, by the names of its tensors."""
    for part, family in _FAMILIES:
        if any(part in name for name in names):
            return family
    return f"something else (its tensors are {', '.join(sorted(names)[:3])} …)"


def read_names(component: Path) -> set[str]:
    """Names of the tensors of a file, or of all files of a folder."""
    return {name for file in weight_files(component) for name in _read_header(file)}


def read_config(component: Path) -> dict[str, Any]:
    """The ``config.json`` of a component.

    Raises:
        CheckpointError: It is missing or broken.
    """
    return _read_json(component / "config.json", f"{component} is incomplete")


def weight_files(component: Path) -> list[Path]:
    """The safetensors files of a component.

    Args:
        component: A folder of them, or one of them.

    Raises:
        CheckpointError: There is none, or one that the folder's index names is missing.
    """
    if component.is_file():
        return [component]
    files = sorted(component.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{component} holds no safetensors file: the model folder is incomplete"
        )
    for index in component.glob("*.safetensors.index.json"):
        named = set(_read_json(index, f"{component} is incomplete").get("weight_map", {}).values())
        absent = sorted(named - {file.name for file in files})
        if absent:
            raise CheckpointError(
                f"{component} lacks {len(absent)} of {len(named)} files, first {absent[0]}: get "
                "the model again"
            )
    return files


def summarise(component: Path) -> TensorSummary:
    """Count a component's tensors from the file headers alone.

    Args:
        component: Folder of safetensors files, or one such file.

    Raises:
        CheckpointError: There is no weights file, or one cannot be read.
    """
    files = weight_files(component)
    tensors = [tensor for file in files for tensor in _read_header(file).values()]
    num_bytes = sum(file.stat().st_size for file in files)
    parameters = sum(prod(shape) for shape, _ in tensors)
    dtypes = tuple(sorted({dtype for _, dtype in tensors}))
    return TensorSummary(len(tensors), parameters, dtypes, num_bytes)


def fingerprint(model: Path | Mapping[str, Sequence[Path]]) -> str:
    """Twelve hexadecimal digits that change when a weights file of a model does.

    Of each file's name, size and first, middle and last 64 KiB, which is quick for 40 GB too.

    Args:
        model: A diffusers-layout folder, or the weights files of each component.
    """
    digest = hashlib.sha256()
    if isinstance(model, Path):
        files = [(file.parent.name, file) for file in sorted(model.glob("*/*.safetensors"))]
    else:
        files = [(name, file) for name in sorted(model) for file in model[name]]
    for component, file in files:
        size = file.stat().st_size
        digest.update(f"{component}/{file.name}:{size}".encode())
        with file.open("rb") as opened:
            for start in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                opened.seek(start)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]


def not_runnable(model: Path) -> str:
    """What is said of a `V1P2` model."""
    return f"{model} is a v1p2 model, which cannot be run yet: give a v1.0 or v1.1 model"


def one_line(error: Exception) -> str:
    """What an error of another library says, on one line of at most 400 characters."""
    text = " ".join(str(error).split())
    return text[:400] or type(error).__name__


def _read_json(file: Path, complaint: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{complaint}: {file.name}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{complaint}: {file.name} is not a JSON object")
    return value


def _read_header(file: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each tensor of a safetensors file."""
    try:
        # "np" opens any dtype's header, and does not import torch as "pt" would.
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({one_line(error)}): get it again") from error
