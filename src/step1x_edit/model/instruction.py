"""Picture and instruction to features: Qwen2.5-VL as the instruction encoder.

`InstructionTokenizer` turns pictures and sentences into tensors; it needs no model and can be pickled, so data workers
run it. `InstructionEncoder` runs the language model over them and cuts out the features that the connector reads. What
differs between checkpoints is data, `InstructionConfig`. Called by the pipeline and by the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from step1x_edit.errors import CheckpointError, InvalidRequest
from step1x_edit.model.instruction_config import RELEASE_V1, InstructionConfig
from step1x_edit.model.quoting import tokenize_quoted
from step1x_edit.model.small_mllm import IMAGE_PAD, VISION_END

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from step1x_edit.model.processor import PictureProcessor

__all__ = [
    "RELEASE_V1",
    "InstructionConfig",
    "InstructionEncoder",
    "InstructionFeatures",
    "InstructionTokenizer",
    "InstructionTokens",
]

_MAX_ASPECT_RATIO = 200  # of transformers' smart_resize


@dataclass(frozen=True)
class InstructionTokens:
    """A batch of chats as the language model reads them, one picture each; CPU tensors until `to`.

    Attributes:
        input_ids: token ids, padded on the right.
        attention_mask: true at real tokens.
        position_ids: rotary positions in time, height and width.
        mm_token_type_ids: 1 at picture tokens, 0 at text.
        quoted: true at tokens that stand for quoted text.
        lengths: real tokens of each row.
        pixel_values: normalised patches of all pictures, one after the other.
        image_grid_thw: frames (1), rows and columns of patches of each picture.
    """

    input_ids: Int[Tensor, "batch length"]
    attention_mask: Bool[Tensor, "batch length"]
    position_ids: Int[Tensor, "3 batch length"]
    mm_token_type_ids: Int[Tensor, "batch length"]
    quoted: Bool[Tensor, "batch length"]
    lengths: Int[Tensor, " batch"]
    pixel_values: Float[Tensor, "patches patch_values"]
    image_grid_thw: Int[Tensor, "batch 3"]

    def to(self, device: torch.device | str) -> InstructionTokens:
        """The same tokens on a device."""
        return InstructionTokens(
            **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        )


@dataclass(frozen=True)
class InstructionFeatures:
    """What the connector reads: features of the tokens after the fixed prefix, zero where there is no token."""

    features: Float[Tensor, "batch length channels"]
    mask: Bool[Tensor, "batch length"]


class InstructionTokenizer:
    """Pictures and instructions to `InstructionTokens`, as one checkpoint wants them.

    Args:
        processor: tokenizer, picture preprocessing and chat template.
        config: the checkpoint's data; its pixel limits win over those of the processor.

    Raises:
        CheckpointError: the prefix has not been fetched, or the tokenizer lacks Qwen's vision tokens.
    """

    def __init__(self, processor: PictureProcessor, config: InstructionConfig) -> None:
        self.processor = processor
        self.config = config
        self._prefix = config.require_prefix()
        self._image_id, self._vision_end_id = (
            self._special_id(token) for token in (IMAGE_PAD, VISION_END)
        )

    def __call__(
        self, images: Sequence[Image.Image | None], instructions: Sequence[str]
    ) -> InstructionTokens:
        """Tokenise a batch.

        Args:
            images: one RGB picture a row; `None` stands for the black picture of text to image.
            instructions: one sentence a row; may be empty.

        Raises:
            InvalidRequest: an instruction is too long or holds a reserved token, or a picture is too elongated.
            CheckpointError: the configured cut is longer than the whole chat.
            ValueError: not as many pictures as instructions, or none.
        """
        if len(images) != len(instructions) or not images:
            raise ValueError(f"{len(images)} pictures for {len(instructions)} instructions")
        pixel_values, grids = self._preprocess(images)
        merged = [self._merged_grid(grid) for grid in grids.tolist()]
        rows = [
            self._row(text, height * width)
            for text, (height, width) in zip(instructions, merged, strict=True)
        ]
        ids = [torch.tensor(row_ids) for row_ids, _ in rows]
        is_image = [row == self._image_id for row in ids]
        positions = [
            _rotary_positions(mask, height, width).T
            for mask, (height, width) in zip(is_image, merged, strict=True)
        ]
        lengths = torch.tensor([len(row) for row in ids])
        return InstructionTokens(
            input_ids=pad_sequence(ids, batch_first=True),
            attention_mask=torch.arange(int(lengths.max())) < lengths[:, None],
            position_ids=pad_sequence(positions, batch_first=True).permute(2, 0, 1),
            mm_token_type_ids=pad_sequence(is_image, batch_first=True).int(),
            quoted=pad_sequence([torch.tensor(quoted) for _, quoted in rows], batch_first=True),
            lengths=lengths,
            pixel_values=pixel_values,
            image_grid_thw=grids,
        )

    def render(self, instruction: str) -> str:
        """The chat text of one instruction, the picture as one placeholder token.

        Raises:
            InvalidRequest: the instruction holds a token that structures the chat.
        """
        tokenizer = self.processor.tokenizer
        for token in tokenizer.added_tokens_decoder.values():
            if token.special and token.content in instruction:
                raise InvalidRequest(
                    f"the instruction holds {token.content!r}, a token reserved for the model: take it out"
                )
        parts = [{"type": "image"}, {"type": "text", "text": instruction}]
        if self.config.layout == "instruction_first":
            parts.reverse()
        if self._prefix:
            parts.insert(0, {"type": "text", "text": self._prefix})
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}],
            chat_template=self.processor.chat_template,
            tokenize=False,
            add_generation_prompt=self.config.add_generation_prompt,
            add_vision_id=self.config.add_vision_id,
        )

    def _row(self, instruction: str, num_image_tokens: int) -> tuple[list[int], list[bool]]:
        """Ids of one chat with its picture's tokens in place, and which of them are quoted text."""
        text = self.render(instruction)
        ids = self.processor.tokenizer.encode(text, add_special_tokens=False)
        quoted = [False] * len(ids)
        if self.config.split_quotes:
            ids, quoted = self._split_quotes(text, ids)
        at = ids.index(self._image_id)
        ids[at : at + 1] = [self._image_id] * num_image_tokens
        quoted[at : at + 1] = [False] * num_image_tokens
        self._check_length(len(ids) - self.config.num_dropped_tokens)
        return ids, quoted

    def _split_quotes(self, text: str, plain: list[int]) -> tuple[list[int], list[bool]]:
        """Swap in the split tokenisation from the end of the picture on; the fixed text before it stays plain."""
        split, quoted = tokenize_quoted(
            self.processor.tokenizer,
            text,
            offset=self.config.quote_offset,
            apostrophe_quotes=self.config.apostrophe_quotes,
        )
        end = plain.index(self._vision_end_id)
        start = split.index(self._vision_end_id)
        return plain[:end] + split[start:], [False] * end + quoted[start:]

    def _check_length(self, num_kept: int) -> None:
        limit = self.config.max_length
        if num_kept > limit:
            raise InvalidRequest(
                f"the instruction takes {num_kept} tokens with its picture, over this model's limit of {limit}: "
                f"shorten it by {num_kept - limit} tokens or more"
            )
        if num_kept < 1:
            raise CheckpointError(
                f"num_dropped_tokens {self.config.num_dropped_tokens} leaves nothing of a chat of "
                f"{num_kept + self.config.num_dropped_tokens} tokens: instruction.json does not fit the tokenizer"
            )

    def _preprocess(self, images: Sequence[Image.Image | None]) -> tuple[Tensor, Tensor]:
        """Patches (N, C * 2 * p * p) of all pictures and their grids (B, 3)."""
        side = self.config.blank_size_px
        pictures = [Image.new("RGB", (side, side)) if image is None else image for image in images]
        for picture in pictures:
            if max(picture.size) > _MAX_ASPECT_RATIO * min(picture.size):
                raise InvalidRequest(
                    f"the picture of {picture.width} x {picture.height} px is over {_MAX_ASPECT_RATIO} times as long "
                    "as it is wide: crop it"
                )
        size = {"shortest_edge": self.config.min_pixels, "longest_edge": self.config.max_pixels}
        batch = self.processor.image_processor(pictures, size=size, return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]

    def _merged_grid(self, grid: list[int]) -> tuple[int, int]:
        """Rows and columns of picture tokens, after the vision tower's merger."""
        merge = self.processor.image_processor.merge_size
        return grid[1] // merge, grid[2] // merge

    def _special_id(self, token: str) -> int:
        found = self.processor.tokenizer.get_added_vocab().get(token)
        if found is None:
            raise CheckpointError(f"the tokenizer has no {token!r}: it is not one of Qwen2.5-VL's")
        return found


class InstructionEncoder:
    """The language model of a checkpoint and its way to read instructions.

    Args:
        text_encoder: transformers' model; runs where it is and in its own precision.
        processor: tokenizer, picture preprocessing and chat template.
        config: the checkpoint's data.

    Raises:
        CheckpointError: the prefix has not been fetched, or the tokenizer lacks Qwen's vision tokens.
    """

    def __init__(
        self,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        processor: PictureProcessor,
        config: InstructionConfig,
    ) -> None:
        self.text_encoder = text_encoder
        self.tokenizer = InstructionTokenizer(processor, config)

    @classmethod
    def from_pretrained(
        cls,
        model_folder: str | Path,
        *,
        config: InstructionConfig | None = None,
        dtype: torch.dtype | None = None,
    ) -> InstructionEncoder:
        """Read the parts of a diffusers-layout model folder: `processor/`, `text_encoder/`, `instruction.json`.

        Args:
            model_folder: a local folder.
            config: for published folders, which hold no `instruction.json`.
            dtype: precision of the language model; that of the file by default.

        Raises:
            CheckpointError: a part is missing or does not fit.
        """
        from transformers import Qwen2_5_VLForConditionalGeneration

        from step1x_edit.model.processor import PictureProcessor

        folder = Path(model_folder)
        config = config or InstructionConfig.load(folder)
        config.require_prefix()  # before the weights are read
        processor = PictureProcessor.from_pretrained(folder / "processor")
        text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "text_encoder", dtype=dtype or "auto"
        )
        return cls(text_encoder, processor, config)

    @property
    def config(self) -> InstructionConfig:
        """The checkpoint's data."""
        return self.tokenizer.config

    def tokenize(
        self, images: Sequence[Image.Image | None], instructions: Sequence[str]
    ) -> InstructionTokens:
        """See `InstructionTokenizer.__call__`."""
        return self.tokenizer(images, instructions)

    def encode(self, tokens: InstructionTokens) -> InstructionFeatures:
        """Features of a batch: the last hidden state after the final norm, the fixed prefix cut off.

        Gradients flow; wrap in `torch.no_grad` where they are not wanted. A row's features do not depend on the other
        rows: padding is on the right, where causal attention never looks.

        Args:
            tokens: from `tokenize`, on any device.

        Returns:
            Features and mask on the language model's device, `max_length` long (or as long as the longest row where
            the checkpoint does not pad).
        """
        tokens = tokens.to(self.text_encoder.device)
        hidden = self.text_encoder.model(
            input_ids=tokens.input_ids,
            # No attention mask: with padding on the right the causal mask alone is exact, and without a mask tensor
            # the attention kernels take their fast causal path.
            position_ids=tokens.position_ids,
            pixel_values=tokens.pixel_values,
            image_grid_thw=tokens.image_grid_thw,
            mm_token_type_ids=tokens.mm_token_type_ids,
            use_cache=False,
        ).last_hidden_state  # (B, L, C)
        num_kept = tokens.lengths - self.config.num_dropped_tokens
        length = self.config.max_length if self.config.pad_to_max_length else int(num_kept.max())
        kept = hidden[:, self.config.num_dropped_tokens :]
        kept = F.pad(kept, (0, 0, 0, length - kept.shape[1]))  # (B, max_length, C)
        mask = torch.arange(length, device=kept.device) < num_kept[:, None]
        return InstructionFeatures(kept.masked_fill(~mask[..., None], 0), mask)


def _rotary_positions(
    is_image: Bool[Tensor, " length"], height: int, width: int
) -> Int[Tensor, "3 length"]:
    """Rotary positions of one chat with one picture (Qwen2-VL, arXiv 2409.12191, section 2.1: M-RoPE).

    Text counts on in all three axes; picture tokens share one time and count rows and columns from it; the text after
    the picture starts past the larger side.
    """
    start = int(is_image.int().argmax())
    num_after = len(is_image) - start - height * width
    before = torch.arange(start).expand(3, -1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns]).reshape(3, -1) + start
    after = (torch.arange(num_after) + start + max(height, width)).expand(3, -1)
    return torch.cat([before, image, after], dim=1)
