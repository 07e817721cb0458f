"""A Qwen2.5-VL of small width: the language model of our mini checkpoint and of the tests.

Same classes as the released text encoder, narrower and fewer layers, and a chat template that costs
four tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"

SMALL_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' }}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{{ '<|im_end|>' }}{%- endfor -%}"
)
"""One user turn without role names, picture numbers or a system turn."""


def small_mllm_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 256,
    num_layers: int = 2,
    num_heads: int = 4,
    vision_hidden_size: int = 64,
    vision_depth: int = 1,
    vision_heads: int = 2,
    mlp_ratio: int = 3,
) -> Qwen2_5_VLConfig:
    """The transformers configuration of a small Qwen2.5-VL for a tokenizer.

    Args:
        tokenizer: gives the vocabulary size and the ids of the special tokens (by Qwen's names).
        hidden_size: width of the language model and its features; a multiple of `4 * num_heads`.
        num_layers: language layers.
        num_heads: attention heads of a language layer.
        vision_hidden_size: width of the vision tower; a multiple of `4 * vision_heads`.
        vision_depth: blocks of the vision tower, all with full attention.
        vision_heads: attention heads of a vision block.
        mlp_ratio: hidden width of the MLPs over the layer's width.

    Raises:
        ValueError: a width does not divide among its heads.
    """
    from transformers import Qwen2_5_VLConfig

    for name, width, heads in (
        ("hidden_size", hidden_size, num_heads),
        ("vision_hidden_size", vision_hidden_size, vision_heads),
    ):
        if width % (4 * heads):
            raise ValueError(f"{name} {width} is not a multiple of 4 x {heads} heads")
    pairs = hidden_size // num_heads // 2
    spatial = (
        pairs * 3 // 8
    )  # time, height and width share the rotary pairs as in the released model: 2 : 3 : 3
    ids = tokenizer.get_added_vocab()
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * mlp_ratio,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [pairs - 2 * spatial, spatial, spatial],
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_hidden_size,
            "intermediate_size": vision_hidden_size * mlp_ratio,
            "num_heads": vision_heads,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": list(range(vision_depth)),
        },
        tie_word_embeddings=True,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
    )
