"""The chat tokenizer and picture preprocessing of Qwen2.5-VL as one object, without video and without torchvision.

transformers' own `Qwen2_5_VLProcessor` refuses to load where torchvision is missing, because its video processor needs
it. Ours reads and writes the same folder (`preprocessor_config.json`, tokenizer files, chat template), so a published
model folder loads, and a folder saved here loads in stock transformers.
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
    from transformers import PreTrainedTokenizerBase

_STOCK_CLASS = "Qwen2_5_VLProcessor"
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


class PictureProcessor(Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` for still pictures: no video processor, so nothing asks for torchvision."""

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> PictureProcessor:  # pyright: ignore[reportIncompatibleMethodOverride] - local folders only, so that no loader asks for video
        """Read a local `processor/` folder, published or ours.

        Args:
            folder: holds `preprocessor_config.json`, the tokenizer files and the chat template.
            kwargs: `subfolder` is followed; what else pipeline loaders pass along has no meaning here.

        Raises:
            CheckpointError: a file is missing or unreadable, or there is no chat template.
        """
        root = Path(folder) / kwargs.get("subfolder", "")
        try:
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(root)
            tokenizer = AutoTokenizer.from_pretrained(root)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{root} is no processor folder of Qwen2.5-VL ({reason}): download the model again"
            ) from error
        template = _read_chat_template(root) or tokenizer.chat_template
        if template is None:
            raise CheckpointError(f"{root} has no chat template ({' or '.join(_TEMPLATE_FILES)})")
        return cls(image_processor, tokenizer, template)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride] - never pushes
        """Write the folder as published: picture settings, tokenizer and chat template in files of their own."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer._set_processor_class(_STOCK_CLASS)
        self.image_processor._set_processor_class(_STOCK_CLASS)
        written = [*self.image_processor.save_pretrained(folder)]
        written += self.tokenizer.save_pretrained(folder)
        template = folder / _TEMPLATE_FILES[0]
        template.write_text(self.chat_template, encoding="utf-8")
        return [*written, str(template)]


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
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
