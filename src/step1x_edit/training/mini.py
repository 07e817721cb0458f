"""The mini model before training: its sizes, its tokenizer, its folder.

Everything is of the released classes at small width, so what runs with the released weights runs
with the mini.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from step1x_edit.datagen.backgrounds import NAMED
from step1x_edit.datagen.captions import wordings
from step1x_edit.datagen.operators.tone import TONES
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS, POSITIONS
from step1x_edit.model.instruction import InstructionConfig
from step1x_edit.model.processor import PictureProcessor, build_processor
from step1x_edit.model.small_mllm import SMALL_CHAT_TEMPLATE, small_mllm_config
from step1x_edit.model.transformer import Step1XEditTransformer2DModel

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
WIDTH = 192
"""Width of the instruction encoder and of the connector."""

EVERYDAY_WORDS = Path(__file__).parent / "everyday_words.txt"
"""Words of instructions that the data engine does not say yet: known to the tokenizer, so that
later training needs no new one and a stranger's sentence stays within the length limit."""

TRANSFORMER: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 5,
    "attention_head_dim": 64,
    "num_attention_heads": 6,
    "axes_dims_rope": (8, 28, 28),
    "joint_attention_dim": WIDTH,
    "vector_in_dim": WIDTH,
    "connector_in_channels": WIDTH,
    "connector_hidden_size": WIDTH,
    "connector_heads_num": 4,
}

INSTRUCTION = InstructionConfig(
    prefix="",
    num_dropped_tokens=1,
    max_length=40,
    add_vision_id=False,
    add_generation_prompt=False,
    apostrophe_quotes=False,
    min_pixels=56 * 56,
    max_pixels=56 * 56,
    blank_size_px=128,
)
"""One dropped token (the chat's start), 2 × 2 picture tokens, 33 tokens for the instruction."""


def train_tokenizer(
    extra_texts: Iterable[str] = (), vocab_size: int = 4096
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over the data engine's own sentences, with Qwen's special tokens.

    Args:
        extra_texts: More English and Chinese text, so that words outside the engine's vocabulary
            stay short.
        vocab_size: Tokens in all.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    texts = (*_own_sentences(), *extra_texts, *[EVERYDAY_WORDS.read_text(encoding="utf-8")] * 20)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        clean_up_tokenization_spaces=False,
    )


def _own_sentences() -> Iterator[str]:
    """Every wording of version 0's edits with every word in its slots once."""
    for language in ("en", "zh"):
        zh = language == "zh"
        slots = {
            "object": [e.zh if zh else name for name, e in OBJECTS.items()],
            "a_object": [f"a {name}" for name in OBJECTS],
            "colour": [e.zh if zh else name for name, e in COLOURS.items()],
            "background": [e.zh if zh else name for name, e in NAMED.items()],
            "where": [place if zh else f"on the {name}" for name, (place, _) in POSITIONS.items()],
        }
        for kind in ("addition", "removal", "colour", "background", *TONES):
            for wording in wordings(kind, language, "plain"):
                used = [slot for slot in slots if "{" + slot + "}" in wording]
                for words in product(*(slots[slot] for slot in used)):
                    yield wording.format(**dict(zip(used, words, strict=True)))
        for position, colour, name in product(POSITIONS, COLOURS, OBJECTS):
            if zh:
                yield f"{POSITIONS[position][0]}有一个{COLOURS[colour].zh}的{OBJECTS[name].zh}，"
            else:
                yield f"a {colour} {name} on the {position}, background"


def emoji_texts(data: Path, repeats: int = 3) -> Iterator[str]:
    """Names and tags, English and Chinese, of the unpacked npm package ``emojibase-data`` (MIT)."""
    for language in ("en", "zh"):
        for entry in json.loads((data / language / "data.json").read_text(encoding="utf-8")):
            words = [entry["label"], *entry.get("tags", [])]
            for _ in range(repeats):
                yield " ".join(words) if language == "en" else "，".join(words)


def build_text_encoder(processor: PictureProcessor) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained instruction encoder."""
    config = small_mllm_config(processor.tokenizer, hidden_size=WIDTH, num_layers=2, num_heads=4)
    return Qwen2_5_VLForConditionalGeneration(config)


def build_transformer() -> Step1XEditTransformer2DModel:
    """The untrained transformer, its gates closed.

    Modulations and the last projection begin at zero (DiT, Peebles & Xie 2023): every block begins
    as the identity.
    """
    model = Step1XEditTransformer2DModel(**TRANSFORMER)
    for name, module in model.named_modules():
        if name.endswith((".linear", "adaLN_modulation.1")) or name == "proj_out":
            module.weight.data.zero_()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue] - a Linear
            module.bias.data.zero_()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue] - a Linear
    return model


def build_mini_processor(tokenizer: PreTrainedTokenizerFast) -> PictureProcessor:
    """Tokenizer, picture preprocessing and chat template of the mini."""
    return build_processor(
        tokenizer,
        SMALL_CHAT_TEMPLATE,
        min_pixels=INSTRUCTION.min_pixels,
        max_pixels=INSTRUCTION.max_pixels,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m step1x_edit.training.mini", description="Make the mini's processor folder."
    )
    parser.add_argument("emojibase", type=Path, help="unpacked npm package emojibase-data@17.0.0")
    parser.add_argument("out", type=Path, help="processor folder to write")
    arguments = parser.parse_args()
    trained = train_tokenizer(emoji_texts(arguments.emojibase))
    build_mini_processor(trained).save_pretrained(arguments.out)
