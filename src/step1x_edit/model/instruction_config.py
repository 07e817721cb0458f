"""How a checkpoint wants its instructions: data beside the weights, in `instruction.json`.

Released models and our mini differ in these values and in nothing else, so that one
`InstructionEncoder` serves them all. The prefix of a released model is prose of its release, which
is fetched and not shipped (`prefix_constant` names it); without it a model refuses to encode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from step1x_edit.errors import CheckpointError
from step1x_edit.files import write_text
from step1x_edit.model.release_text import kept_text

CONFIG_NAME = "instruction.json"
_TOKEN_AREA = 28 * 28  # pixels that one picture token of Qwen2.5-VL stands for


class InstructionConfig(BaseModel):
    """How picture and instruction become features; immutable, extra keys refused.

    Attributes:
        prefix: text in front of picture and instruction; empty for none, `None` while it is still
            to be fetched.
        prefix_constant: the official constant that holds the prefix, where it is not shipped.
        layout: which comes first after the prefix.
        add_generation_prompt: end the chat with the opening of the assistant's turn.
        add_vision_id: let the chat template number the pictures ("Picture 1: ").
        num_dropped_tokens: leading tokens (the fixed part of the chat) whose features are cut off.
        max_length: most tokens that may remain after the cut, with those of the picture.
        pad_to_max_length: zero-pad features to `max_length`; otherwise to the batch's longest row.
        split_quotes: tokenise quoted text one character at a time.
        apostrophe_quotes: an apostrophe opens a quotation, as in the released models.
        quote_offset: quotes up to this character of the chat text do not count.
        min_pixels: pictures of a smaller area are enlarged for the language model.
        max_pixels: pictures of a larger area are reduced.
        blank_size_px: side of the black picture that stands in where there is none (text to image).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix: str | None = ""
    prefix_constant: str | None = None
    layout: Literal["picture_first", "instruction_first"] = "picture_first"
    add_generation_prompt: bool = True
    add_vision_id: bool = True
    num_dropped_tokens: int = Field(ge=0)
    max_length: int = Field(ge=1)
    pad_to_max_length: bool = True
    split_quotes: bool = True
    apostrophe_quotes: bool = True
    quote_offset: int = Field(default=0, ge=-1)
    min_pixels: int = Field(ge=1)
    max_pixels: int = Field(ge=1)
    blank_size_px: int = Field(default=1024, ge=1)

    @model_validator(mode="after")
    def _limits_in_order(self) -> InstructionConfig:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> InstructionConfig:
        """Read the configuration of a model folder, or a JSON file.

        Raises:
            CheckpointError: the file is missing or not JSON, or a value is unknown, missing or
                impossible.
        """
        file = Path(path)
        if file.is_dir():
            file = file / CONFIG_NAME
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({type(error).__name__}): download the model again or pass "
                "the instruction configuration of its release"
            ) from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise CheckpointError(f"{file}: {where}: {first['msg']}") from error

    def save(self, folder: str | Path) -> Path:
        """Write `instruction.json` into a folder (made if missing) and return its path."""
        target = Path(folder) / CONFIG_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        return write_text(target, self.model_dump_json(indent=2) + "\n")

    def with_prefix(self, prefix: str) -> InstructionConfig:
        """The same configuration with the fetched prefix filled in."""
        return self.model_copy(update={"prefix": prefix})

    def with_kept_prefix(self) -> InstructionConfig:
        """The same configuration, a missing prefix filled in where this machine has a copy."""
        kept = kept_text(self.prefix_constant or "") if self.prefix is None else None
        return self if kept is None else self.with_prefix(kept)

    def require_prefix(self) -> str:
        """The prefix, or an error that says how to get it.

        Raises:
            CheckpointError: the prefix of a released model has not been fetched yet.
        """
        if self.prefix is None:
            raise CheckpointError(
                f"the instruction prefix {self.prefix_constant!r} of this model is not here (it is "
                "text of the official release, which is not ours to ship): fetch it with "
                "`step1x models pull constants`, offline with `--official-source DIR` besides, DIR "
                "being a checkout of the release"
            )
        return self.prefix


RELEASE_V1 = InstructionConfig(
    prefix=None,
    prefix_constant="Qwen25VL_7b_PREFIX",
    num_dropped_tokens=217,
    max_length=640,
    quote_offset=155,
    min_pixels=256 * _TOKEN_AREA,
    max_pixels=324 * _TOKEN_AREA,
)
"""Step1X-Edit v1.0 and v1.1 (spec: official-model.md, sections 3.4 to 3.6)."""


def read_instruction(folder: Path) -> InstructionConfig:
    """How the model of a folder wants its instructions: as its file says, or as released.

    Args:
        folder: The published ones hold no `instruction.json`.

    Raises:
        CheckpointError: The file is broken.
    """
    return InstructionConfig.load(folder) if (folder / CONFIG_NAME).exists() else RELEASE_V1
