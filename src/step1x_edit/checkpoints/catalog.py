"""The models that have a name, and where each of them is."""

from pathlib import Path
from typing import NamedTuple

from step1x_edit.errors import InvalidRequest

DEFAULT_MODEL = "mini"
MINI_FOLDER = Path(__file__).parent.parent / "assets" / "mini"

RELEASE = "stepfun-ai/Step1X-Edit"
VAE_FILE = "vae.safetensors"
MLLM_NAME = "Qwen2.5-VL-7B-Instruct"
"""Folder that the release keeps the language model in, beside the other files."""
MLLM_REPOSITORY = f"Qwen/{MLLM_NAME}"


class CatalogEntry(NamedTuple):
    """A named model."""

    location: str
    """Folder, or repository on the hub."""
    size: str
    description: str
    transformer_file: str = ""
    """Official single file in the repository; empty where that is in the diffusers layout. The
    autoencoder is then `RELEASE`'s and the language model `MLLM_REPOSITORY`'s."""


CATALOG: dict[str, CatalogEntry] = {
    "mini": CatalogEntry(
        str(MINI_FOLDER), "46 MB", "ships with the package; a demonstration on CPUs"
    ),
    "v1.1": CatalogEntry(
        "stepfun-ai/Step1X-Edit-v1p1-diffusers",
        "41.8 GB",
        "the released v1.1, edit and text to image",
    ),
    "v1.1-official": CatalogEntry(
        RELEASE,
        "41.8 GB",
        "the same, its transformer in the official single file",
        "step1x-edit-v1p1-official.safetensors",
    ),
    "v1.0": CatalogEntry(
        RELEASE,
        "41.8 GB",
        "the first release, edit only",
        "step1x-edit-i1258.safetensors",
    ),
    "v1.0-fp8": CatalogEntry(
        "meimeilook/Step1X-Edit-FP8",
        "29.4 GB",
        "the first release, its transformer stored in fp8 by the community",
        "step1x-edit-i1258-FP8.safetensors",
    ),
}


def locate(model: str) -> str:
    """The folder, file or hub repository of a model.

    Args:
        model: A name of `CATALOG`, a folder, a safetensors file, or a hub repository
            (``owner/name``).

    Raises:
        InvalidRequest: None of these.
    """
    if model in CATALOG:
        return CATALOG[model].location
    if Path(model).exists():
        return model
    is_file_name = model.endswith(".safetensors")
    is_repository = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if is_repository and not is_file_name:
        return model
    known = ", ".join(CATALOG)
    problem = "no such model file" if is_file_name else "unknown model"
    raise InvalidRequest(
        f"{problem} {model!r}: give one of {known}, a model folder or file, or a hub repository"
    )
