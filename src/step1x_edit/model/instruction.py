"""Picture and instruction to features: Qwen2.5-VL as the instruction encoder.

`InstructionEncoder` tokenises (`instruction_tokens`), runs the language model over the tokens and
cuts out the features that the connector reads. What differs between checkpoints is data,
`InstructionConfig`. Called by the pipeline and by the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn

from step1x_edit.errors import CheckpointError
from step1x_edit.model.instruction_config import RELEASE_V1, InstructionConfig
from step1x_edit.model.instruction_tokens import InstructionTokenizer, InstructionTokens

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
    "encode_tokens",
    "load_text_encoder",
]


@dataclass(frozen=True)
class InstructionFeatures:
    """What the connector reads: one feature a token after the fixed prefix, zeros after the last.

    Attributes:
        features: last hidden states of the language model.
        mask: true at real tokens.
    """

    features: Float[Tensor, "batch length channels"]
    mask: Bool[Tensor, "batch length"]


class InstructionEncoder:
    """The language model of a checkpoint and its way to read instructions.

    Args:
        text_encoder: transformers' model; runs where it is and in its own precision.
        processor: tokenizer, picture preprocessing and chat template.
        config: the checkpoint's data.

    Raises:
        CheckpointError: the prefix is still to be fetched, or the tokenizer is not Qwen2.5-VL's.
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
        """Read `processor/`, `text_encoder/` and `instruction.json` of a diffusers-layout folder.

        Args:
            model_folder: a local folder.
            config: for published folders, which hold no `instruction.json`.
            dtype: precision of the language model; that of the file by default.

        Raises:
            CheckpointError: a part is missing or does not fit.
        """
        from step1x_edit.model.processor import PictureProcessor

        folder = Path(model_folder)
        config = config or InstructionConfig.load(folder)
        config.require_prefix()  # before gigabytes are read
        processor = PictureProcessor.from_pretrained(folder / "processor")
        return cls(load_text_encoder(folder / "text_encoder", dtype=dtype), processor, config)

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
        """See `encode_tokens`."""
        return encode_tokens(self.text_encoder, self.config, tokens)


def encode_tokens(
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    config: InstructionConfig,
    tokens: InstructionTokens,
) -> InstructionFeatures:
    """The language model's last hidden state after its final norm, the fixed prefix cut off.

    Gradients flow; wrap in `torch.no_grad` where they are not wanted. A row does not depend on the
    others: padding is on the right, where causal attention never looks.

    Args:
        text_encoder: transformers' model.
        config: the checkpoint's data.
        tokens: from `InstructionEncoder.tokenize`, on any device.

    Returns:
        Features and mask on the language model's device, `max_length` long, or as long as the
        longest row where the checkpoint does not pad.
    """
    tokens = tokens.to(text_encoder.device)
    hidden = text_encoder.model(
        # No attention mask: with padding on the right the causal one alone is exact, and without a
        # mask tensor the attention kernels take their fast path.
        input_ids=tokens.input_ids,
        position_ids=tokens.position_ids,
        pixel_values=tokens.pixel_values,
        image_grid_thw=tokens.image_grid_thw,
        mm_token_type_ids=tokens.mm_token_type_ids,
        use_cache=False,
    ).last_hidden_state  # (B, L, C)
    # A model that waits in main memory leaves its results on the device that it ran on.
    num_kept = tokens.lengths.to(hidden.device) - config.num_dropped_tokens
    length = config.max_length if config.pad_to_max_length else int(num_kept.max())
    kept = hidden[:, config.num_dropped_tokens :]
    kept = nn.functional.pad(kept, (0, 0, 0, length - kept.shape[1]))  # (B, length, C)
    mask = torch.arange(length, device=kept.device) < num_kept[:, None]
    return InstructionFeatures(kept.masked_fill(~mask[..., None], 0), mask)


def load_text_encoder(
    folder: str | Path, *, dtype: torch.dtype | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """Read a `text_encoder/` folder strictly.

    Args:
        folder: a local folder in transformers' layout.
        dtype: precision to hold the weights in; that of the file by default.

    Raises:
        CheckpointError: files are missing, or tensors are missing, unexpected or misshapen.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    try:
        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below with the rest
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{folder} cannot be read as a text encoder ({reason}): download the model again"
        ) from error
    model, info = loaded  # a pair because of `output_loading_info`
    wrong = {
        kind: sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[f"{kind}_keys"])
        for kind in ("missing", "unexpected", "mismatched")
    }
    if any(wrong.values()):
        counts = "; ".join(
            f"{len(names)} {kind} (first {', '.join(names[:3])})"
            for kind, names in wrong.items()
            if names
        )
        raise CheckpointError(f"{folder} does not fit its config.json: {counts}")
    return model
