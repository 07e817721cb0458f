"""What can be refused before a model is loaded, and without importing torch.

The networks take seconds to import and longer to load; whoever mistyped a name should not wait for
them. `Editor` checks again what it is given.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from step1x_edit import images
from step1x_edit.checkpoints import resolve
from step1x_edit.checkpoints.resolve import ModelFiles
from step1x_edit.errors import InvalidRequest
from step1x_edit.model.inputs import check_drawing
from step1x_edit.request import EditRequest, ModelForm


def check_model(model: str) -> ModelFiles | None:
    """Look a model up, and into its files' headers; None where it still has to be fetched.

    Raises:
        InvalidRequest: No such model is known.
        CheckpointError: It is of another family, or files are missing or broken.
    """
    files = resolve.find(model)
    if files is not None:
        files.check()
    return files


def check_conversion(source: str, target: Path, to: str) -> Path:
    """Where the source of a conversion is.

    Raises:
        InvalidRequest: There is no such source, the target exists or cannot be made, or the form is
            unknown.
        CheckpointError: The source is no complete model.
    """
    forms = get_args(ModelForm)
    if to not in forms:
        raise InvalidRequest(f"--to {to}: give one of {', '.join(forms)}")
    if target.exists():
        raise InvalidRequest(f"{target} exists already: give another name, or remove it")
    check_folder(target.parent)
    if Path(source).is_file():
        if to == "official":
            raise InvalidRequest(f"{source} is an official file already: give a model folder")
        return Path(source)
    model = check_model(source)
    if model is None:
        raise InvalidRequest(f"{source} is not on this machine: give a folder or a file")
    if model.layout == "diffusers":
        return model.place
    return model.components["transformer"]


def check_pictures(request: EditRequest) -> images.Picture | None:
    """Open the picture and the mask of a request; None where a picture is drawn.

    Raises:
        InvalidRequest: One cannot be used.
    """
    if request.image is None:
        return None
    picture = images.open_picture(request.image, max_pixels=request.max_pixels)
    if request.mask is not None:
        images.open_mask(request.mask, picture, max_pixels=request.max_pixels)
    return picture


def check_size(
    picture: images.Picture | None, request: EditRequest, model: ModelFiles | None
) -> None:
    """Refuse what cannot be brought to the model's size, and a drawing that it never learned.

    Args:
        picture: None where one is to be drawn.
        request: What is asked.
        model: None where it is not here yet.

    Raises:
        InvalidRequest: The picture is too elongated, or a v1.0 model should draw.
    """
    if picture is None and model is not None:
        check_drawing(model.version)
    level = request.size_level_px or (model and model.settings.size_level)
    if picture is not None and level:
        images.fit_size(*picture.size, level)


def check_outputs(
    out: Path, num_images: int, sources: Sequence[Path], *, overwrite: bool
) -> list[Path]:
    """Where the results go: `out`, or ``out-1``, ``out-2`` … where there are several.

    Args:
        out: File that was asked for.
        num_images: Number of results.
        sources: Files that are not written over.
        overwrite: They are after all.

    Raises:
        InvalidRequest: The folder is missing or closed, the kind of file is unknown, or a result
            would replace a source.
    """
    targets = [out]
    if num_images > 1:
        targets = [out.with_stem(f"{out.stem}-{i}") for i in range(1, num_images + 1)]
    for target in targets:
        images.check_output(target)
        for source in sources:
            images.check_output(target, source=source, overwrite=overwrite)
    check_folder(out.parent)
    return targets


def check_folder(folder: Path) -> None:
    """Refuse a folder that results cannot be written into.

    Raises:
        InvalidRequest: It does not exist, or is closed.
    """
    if not folder.is_dir():
        raise InvalidRequest(f"output folder {folder} does not exist: make it (mkdir -p {folder})")
    if not os.access(folder, os.W_OK):
        raise InvalidRequest(f"output folder {folder} may not be written to: choose another")
