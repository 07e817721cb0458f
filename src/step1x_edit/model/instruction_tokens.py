"""Pictures and instructions to tensors, as one checkpoint's language model reads them.

Needs no model and can be pickled, so that data workers run it in processes of their own. Called
through `InstructionEncoder.tokenize`, and by the trainer's data workers directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from step1x_edit.errors import CheckpointError, InvalidRequest
from step1x_edit.model.quoting import tokenize_quoted
from step1x_edit.model.small_mllm import IMAGE_PAD, VISION_END, VISION_START

if TYPE_CHECKING:
    from step1x_edit.model.instruction_config import InstructionConfig
    from step1x_edit.model.processor import PictureProcessor

_MAX_ASPECT_RATIO = 200  # transformers' smart_resize refuses more


@dataclass(frozen=True)
class InstructionTokens:
    """A batch of chats as the language model reads them, one picture each.

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
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return InstructionTokens(**moved)

    def rows(self, chosen: slice) -> InstructionTokens:
        """Some of the chats, as wide as all of them."""
        ends = self.image_grid_thw.prod(-1).cumsum(0).tolist()
        first, last, _ = chosen.indices(len(ends))
        start, stop = ([0, *ends][row] for row in (first, last))
        return InstructionTokens(
            self.input_ids[chosen],
            self.attention_mask[chosen],
            self.position_ids[:, chosen],
            self.mm_token_type_ids[chosen],
            self.quoted[chosen],
            self.lengths[chosen],
            self.pixel_values[start:stop],
            self.image_grid_thw[chosen],
        )


class InstructionTokenizer:
    """Pictures and instructions to `InstructionTokens`, as one checkpoint wants them.

    Args:
        processor: tokenizer, picture preprocessing and chat template.
        config: the checkpoint's data; its pixel limits win over those of the processor.

    Raises:
        CheckpointError: the prefix is still to be fetched, or the tokenizer is not Qwen2.5-VL's.
    """

    def __init__(self, processor: PictureProcessor, config: InstructionConfig) -> None:
        self.processor = processor
        self.config = config
        self._prefix = config.require_prefix()
        self._image_id, self._vision_end_id = map(self._special_id, (IMAGE_PAD, VISION_END))
        self._reserved = [
            token.content
            for token in processor.tokenizer.added_tokens_decoder.values()
            if token.special
        ]

    def __call__(
        self, images: Sequence[Image.Image | None], instructions: Sequence[str]
    ) -> InstructionTokens:
        """Tokenise a batch; no row depends on another.

        Args:
            images: one RGB picture a row; `None` stands for the black picture of text to image.
            instructions: one sentence a row; may be empty.

        Raises:
            InvalidRequest: an instruction is too long or holds a reserved token, or a picture is
                too elongated.
            CheckpointError: the configured cut is longer than the whole chat.
            ValueError: not as many pictures as instructions, or none.
        """
        if len(images) != len(instructions) or not images:
            raise ValueError(f"{len(images)} pictures for {len(instructions)} instructions")
        pixel_values, grids = self._preprocess(images)
        merge = self.processor.image_processor.merge_size
        merged = [(rows // merge, columns // merge) for _, rows, columns in grids.tolist()]
        rows = [
            self._row(instruction, height * width)
            for instruction, (height, width) in zip(instructions, merged, strict=True)
        ]
        ids = [torch.tensor(row_ids) for row_ids, _ in rows]
        is_image = [row == self._image_id for row in ids]
        positions = [
            _rotary_positions(row, height, width).T  # (L, 3)
            for row, (height, width) in zip(is_image, merged, strict=True)
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
        for token in self._reserved:
            if token in instruction:
                raise InvalidRequest(
                    f"the instruction holds {token!r}, which is reserved for the model: take it out"
                )
        parts = [{"type": "image"}, {"type": "text", "text": instruction}]
        if self.config.layout == "instruction_first":
            parts.reverse()
        if self._prefix:
            parts.insert(0, {"type": "text", "text": self._prefix})
        text = self.processor.tokenizer.apply_chat_template(
            cast(Any, [{"role": "user", "content": parts}]),  # its annotation knows text only
            chat_template=self.processor.chat_template,
            tokenize=False,
            add_generation_prompt=self.config.add_generation_prompt,
            add_vision_id=self.config.add_vision_id,
        )
        return cast(str, text)

    def _row(self, instruction: str, num_image_tokens: int) -> tuple[list[int], list[bool]]:
        """Ids of one chat with its picture's tokens in place, and which are quoted text."""
        text = self.render(instruction)
        ids, quoted = self._split(text) if self.config.split_quotes else self._plain(text)
        at = ids.index(self._image_id)
        ids[at : at + 1] = [self._image_id] * num_image_tokens
        quoted[at : at + 1] = [False] * num_image_tokens
        self._check_length(len(ids))
        return ids, quoted

    def _plain(self, text: str) -> tuple[list[int], list[bool]]:
        ids = self.processor.tokenizer.encode(text, add_special_tokens=False)
        return ids, [False] * len(ids)

    def _split(self, text: str) -> tuple[list[int], list[bool]]:
        """Split quoted text on the instruction's side of the picture; the other side stays plain.

        Where the picture comes first, quoting is followed from the start of the chat, as released.
        """
        tokenizer = self.processor.tokenizer
        rule = {
            "offset": self.config.quote_offset,
            "apostrophe_quotes": self.config.apostrophe_quotes,
        }
        if self.config.layout == "instruction_first":
            before, mark, after = text.partition(VISION_START)
            ids, quoted = tokenize_quoted(tokenizer, before, **rule)
            picture, plain = self._plain(mark + after)
            return ids + picture, quoted + plain
        ids, quoted = tokenize_quoted(tokenizer, text, **rule)
        if self._vision_end_id not in ids:
            raise CheckpointError(
                f"a quote in the prefix after character {self.config.quote_offset} is never closed:"
                " correct prefix or quote_offset in instruction.json"
            )
        start = ids.index(self._vision_end_id)
        picture, plain = self._plain(text)
        end = picture.index(self._vision_end_id)
        return picture[:end] + ids[start:], plain[:end] + quoted[start:]

    def _check_length(self, num_tokens: int) -> None:
        limit, num_dropped = self.config.max_length, self.config.num_dropped_tokens
        num_kept = num_tokens - num_dropped
        if num_kept > limit:
            raise InvalidRequest(
                f"the instruction takes {num_kept} tokens with its picture, over this model's limit"
                f" of {limit}: shorten it by {num_kept - limit} tokens or more"
            )
        if num_kept < 1:
            raise CheckpointError(
                f"num_dropped_tokens {num_dropped} leaves nothing of a chat of {num_tokens} tokens:"
                " instruction.json does not belong to this tokenizer"
            )

    def _preprocess(self, images: Sequence[Image.Image | None]) -> tuple[Tensor, Tensor]:
        """Patches of all pictures (N, values) and their grids (B, 3)."""
        side = self.config.blank_size_px
        pictures = [Image.new("RGB", (side, side)) if image is None else image for image in images]
        for picture in pictures:
            if max(picture.size) > _MAX_ASPECT_RATIO * min(picture.size):
                raise InvalidRequest(
                    f"the picture of {picture.width} x {picture.height} px is more than "
                    f"{_MAX_ASPECT_RATIO} times as long as it is wide: crop it"
                )
        size = {"shortest_edge": self.config.min_pixels, "longest_edge": self.config.max_pixels}
        batch = self.processor.image_processor(pictures, size=size, return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]

    def _special_id(self, token: str) -> int:
        found = self.processor.tokenizer.get_added_vocab().get(token)
        if found is None:
            raise CheckpointError(f"the tokenizer has no {token!r}: it is not one of Qwen2.5-VL's")
        return found


def _rotary_positions(
    is_image: Bool[Tensor, " length"], height: int, width: int
) -> Int[Tensor, "3 length"]:
    """Rotary positions of one chat with one picture (M-RoPE: Qwen2-VL, arXiv 2409.12191, 2.1).

    Text counts on in all three axes; picture tokens share one time and count rows and columns from
    it; the text after the picture starts past its longer side.
    """
    start = int(is_image.int().argmax())
    num_after = len(is_image) - start - height * width
    before = torch.arange(start).expand(3, -1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns]).reshape(3, -1) + start
    after = (torch.arange(num_after) + start + max(height, width)).expand(3, -1)
    return torch.cat([before, image, after], dim=1)
