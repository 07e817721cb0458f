"""Qwen2.5-VL's tokenizer and picture preprocessing as one object, without video and torchvision.

transformers' own `Qwen2_5_VLProcessor` refuses to load where torchvision is missing, because its
video processor needs it. Ours reads and writes the files of the published folders
(`preprocessor_config.json`, the tokenizer's, the chat template).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from step1x_edit.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_STOCK_CLASS = "Qwen2_5_VLProcessor"
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


class PictureProcessor(Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` for still pictures: nothing in it asks for torchvision.

    Args:
        image_processor: resizes with Pillow, normalises and cuts into patches.
        tokenizer: knows the special tokens of Qwen2.5-VL by their names.
        chat_template: Jinja source of the chat.
    """

    image_processor: Qwen2VLImageProcessorPil
    tokenizer: PreTrainedTokenizerFast
    chat_template: str  # pyright: ignore[reportIncompatibleVariableOverride] - never several

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    # Narrower than the base class on purpose: local folders in, local folders out.
    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, folder: str | Path, **kwargs: Any
    ) -> PictureProcessor:
        """Read a `processor/` folder, published or ours.

        Args:
            folder: holds `preprocessor_config.json`, the tokenizer files and the chat template.
            kwargs: `subfolder` is followed; what else pipeline loaders pass has no meaning here.

        Raises:
            CheckpointError: a file is missing or unreadable, or there is no chat template.
        """
        root = Path(folder) / kwargs.get("subfolder", "")
        try:
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(root, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(root, local_files_only=True)
            template = _read_chat_template(root) or tokenizer.chat_template
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{root} is no processor folder of Qwen2.5-VL ({reason}): download the model again"
            ) from error
        if template is None:
            raise CheckpointError(f"{root} has no chat template ({' or '.join(_TEMPLATE_FILES)})")
        return cls(image_processor, tokenizer, template)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, **_: Any
    ) -> list[str]:
        """Write the folder as published and return the paths of its files."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # The stock class, so that transformers knows the folder without this package.
        self.tokenizer._set_processor_class(_STOCK_CLASS)
        written = [*self.image_processor.save_pretrained(folder)]
        written += self.tokenizer.save_pretrained(folder)
        template = folder / _TEMPLATE_FILES[0]
        template.write_text(self.chat_template, encoding="utf-8")
        return [*written, str(template)]


def build_processor(
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    *,
    min_pixels: int,
    max_pixels: int,
    patch_size: int = 14,
) -> PictureProcessor:
    """A processor for a model of our own.

    Args:
        tokenizer: must know the special tokens of Qwen2.5-VL by their names.
        chat_template: Jinja source; see `SMALL_CHAT_TEMPLATE` for one that costs few tokens.
        min_pixels: pictures of a smaller area are enlarged.
        max_pixels: pictures of a larger area are reduced.
        patch_size: side of a vision patch in pixels; a merged token covers twice that.
    """
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size, size={"shortest_edge": min_pixels, "longest_edge": max_pixels}
    )
    return PictureProcessor(image_processor, tokenizer, chat_template)


def _read_chat_template(folder: Path) -> str | None:
    jinja, older = (folder / name for name in _TEMPLATE_FILES)
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    if older.exists():
        return json.loads(older.read_text(encoding="utf-8"))["chat_template"]
    return None
