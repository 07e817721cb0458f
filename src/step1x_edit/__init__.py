"""Edit a picture by telling it what to change: the open Step1X-Edit models.

The names below are imported when they are first used, so that ``import step1x_edit`` costs nothing
and does not import torch.

    from step1x_edit import Editor, EditRequest

    result = Editor.load().edit(EditRequest(image="photo.jpg", prompt="make it black and white"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step1x_edit.editor import Editor
    from step1x_edit.errors import CheckpointError, InvalidRequest, MissingExtra, Step1XEditError
    from step1x_edit.model.pipeline import Step1XEditPipeline
    from step1x_edit.model.transformer import Step1XEditTransformer2DModel
    from step1x_edit.request import EditRequest, EditResult, RuntimeConfig

    __version__: str

__all__ = [
    "CheckpointError",
    "EditRequest",
    "EditResult",
    "Editor",
    "InvalidRequest",
    "MissingExtra",
    "RuntimeConfig",
    "Step1XEditError",
    "Step1XEditPipeline",
    "Step1XEditTransformer2DModel",
]

_MODULES = {
    "Editor": "editor",
    "Step1XEditPipeline": "model.pipeline",
    "Step1XEditTransformer2DModel": "model.transformer",
    **dict.fromkeys(("EditRequest", "EditResult", "RuntimeConfig"), "request"),
    **dict.fromkeys(
        ("CheckpointError", "InvalidRequest", "MissingExtra", "Step1XEditError"), "errors"
    ),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("step1x-edit")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
