"""LoRA files from one layout into another: ``step1x lora convert``."""

from pathlib import Path

from step1x_edit.errors import InvalidRequest
from step1x_edit.model.lora_layouts import Layout
from step1x_edit.model.lora_tensors import change_layout, read_lora, write_lora


def convert(source: Path, target: Path, layout: Layout) -> Layout:
    """Write a LoRA in another layout, its metadata kept.

    Args:
        source: LoRA file of any layout.
        target: File to write; replaced when the new one is whole.
        layout: The wanted one.

    Returns:
        The layout of the source.

    Raises:
        InvalidRequest: The target is the source, no .safetensors file, or in no folder.
        CheckpointError: The source is no whole LoRA of Step1X-Edit, or cannot be put into that
            layout without rounding.
    """
    if target.suffix != ".safetensors" or target.is_dir():
        raise InvalidRequest(f"{target}: give a file name that ends in .safetensors")
    if not target.parent.is_dir():
        raise InvalidRequest(f"{target.parent}: no such folder: make it first")
    if target.exists() and source.exists() and target.samefile(source):
        raise InvalidRequest(f"{target} is the source: give another name")
    header, lora = read_lora(source)
    write_lora(change_layout(lora, layout), target)
    return header.layout
