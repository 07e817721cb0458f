"""The models that have a name, and where each of them is."""

from pathlib import Path
from typing import NamedTuple

from step1x_edit.errors import InvalidRequest

DEFAULT_MODEL = "mini"
MINI_FOLDER = Path(__file__).parent.parent / "assets" / "mini"


class CatalogEntry(NamedTuple):
    """A named model."""

    location: str
    """Folder, or repository on the Hugging Face hub."""
    size: str
    description: str


CATALOG: dict[str, CatalogEntry] = {
    "mini": CatalogEntry(
        str(MINI_FOLDER), "46 MB", "ships with the package; a demonstration on CPUs"
    ),
    "v1.1": CatalogEntry(
        "stepfun-ai/Step1X-Edit-v1p1-diffusers",
        "41.8 GB",
        "the released v1.1, edit and text to image",
    ),
}


def locate(model: str) -> str:
    """The folder or hub repository of a model.

    Args:
        model: A name of `CATALOG`, a folder, or a hub repository (``owner/name``).

    Raises:
        InvalidRequest: None of these.
    """
    if model in CATALOG:
        return CATALOG[model].location
    if Path(model).is_dir():
        return model
    is_repository = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if is_repository:
        return model
    known = ", ".join(CATALOG)
    raise InvalidRequest(
        f"unknown model {model!r}: give one of {known}, a model folder, or a hub repository"
    )
