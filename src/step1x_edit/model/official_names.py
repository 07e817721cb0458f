"""The names of the transformer's tensors in the official layout and in ours, in one table.

Without torch, so that what only reads names and headers answers at once. `official_layout` moves
whole checkpoints through it, `lora_layouts` finds the layers that a LoRA file belongs to.
"""

from collections.abc import Sequence

TRANSFORMER_TABLE: tuple[tuple[str, ...], ...] = (
    ("time_in.in_layer.*", "time_embed.in_layer.*"),
    ("time_in.out_layer.*", "time_embed.out_layer.*"),
    ("vector_in.in_layer.*", "vec_embed.in_layer.*"),
    ("vector_in.out_layer.*", "vec_embed.out_layer.*"),
    ("txt_in.*", "context_embedder.*"),
    ("img_in.*", "x_embedder.*"),
    ("double_blocks.#.img_mod.lin.*", "transformer_blocks.#.norm1.linear.*"),
    (
        "double_blocks.#.img_attn.qkv.*",
        "transformer_blocks.#.attn.to_q.*",
        "transformer_blocks.#.attn.to_k.*",
        "transformer_blocks.#.attn.to_v.*",
    ),
    ("double_blocks.#.img_attn.norm.query_norm.scale", "transformer_blocks.#.attn.norm_q.weight"),
    ("double_blocks.#.img_attn.norm.key_norm.scale", "transformer_blocks.#.attn.norm_k.weight"),
    ("double_blocks.#.img_attn.proj.*", "transformer_blocks.#.attn.to_out.0.*"),
    ("double_blocks.#.img_mlp.0.*", "transformer_blocks.#.ff.net.0.proj.*"),
    ("double_blocks.#.img_mlp.2.*", "transformer_blocks.#.ff.net.2.*"),
    ("double_blocks.#.txt_mod.lin.*", "transformer_blocks.#.norm1_context.linear.*"),
    (
        "double_blocks.#.txt_attn.qkv.*",
        "transformer_blocks.#.attn.add_q_proj.*",
        "transformer_blocks.#.attn.add_k_proj.*",
        "transformer_blocks.#.attn.add_v_proj.*",
    ),
    (
        "double_blocks.#.txt_attn.norm.query_norm.scale",
        "transformer_blocks.#.attn.norm_added_q.weight",
    ),
    (
        "double_blocks.#.txt_attn.norm.key_norm.scale",
        "transformer_blocks.#.attn.norm_added_k.weight",
    ),
    ("double_blocks.#.txt_attn.proj.*", "transformer_blocks.#.attn.to_add_out.*"),
    ("double_blocks.#.txt_mlp.0.*", "transformer_blocks.#.ff_context.net.0.proj.*"),
    ("double_blocks.#.txt_mlp.2.*", "transformer_blocks.#.ff_context.net.2.*"),
    ("single_blocks.#.modulation.lin.*", "single_transformer_blocks.#.norm.linear.*"),
    (
        "single_blocks.#.linear1.*",
        "single_transformer_blocks.#.attn.to_q.*",
        "single_transformer_blocks.#.attn.to_k.*",
        "single_transformer_blocks.#.attn.to_v.*",
        "single_transformer_blocks.#.proj_mlp.*",
    ),
    ("single_blocks.#.norm.query_norm.scale", "single_transformer_blocks.#.attn.norm_q.weight"),
    ("single_blocks.#.norm.key_norm.scale", "single_transformer_blocks.#.attn.norm_k.weight"),
    ("single_blocks.#.linear2.*", "single_transformer_blocks.#.proj_out.*"),
    ("final_layer.linear.*", "proj_out.*"),
    ("final_layer.adaLN_modulation.1.*", "norm_out.linear.*"),
)
"""Official name, then ours. `#` is a block's index, `*` stands for weight and bias. Where several
of ours belong to one official tensor, they follow each other along its first axis."""

HALVES_SWAPPED = "final_layer.adaLN_modulation.1."
"""Shift before scale in the official file, scale before shift in ours."""


def first_names(names: Sequence[str], limit: int = 5) -> str:
    """The first few of `names` in one line."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
