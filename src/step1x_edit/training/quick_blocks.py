"""The transformer's blocks in the form that trains fastest on a CPU; the network stays as it is.

`quicken` gives every block another `forward` over the same parameters, made of `quick_ops`. Besides
that, two kinds of work are left out that no result depends on: padding tokens of a sample are all
alike in every block, so that a few of them stand for all, with their weight in the attention; and
the last block answers for the tokens alone whose velocity is asked for. Losses and gradients are
the plain form's to bfloat16 rounding.
"""

from __future__ import annotations

import math
import threading
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from step1x_edit.model.blocks import (
    Step1XEditSingleTransformerBlock,
    Step1XEditTransformerBlock,
)
from step1x_edit.model.instruction import InstructionFeatures
from step1x_edit.model.transformer import Step1XEditTransformer2DModel
from step1x_edit.training.quick_ops import (
    attend,
    gated_sum,
    modulated_norm,
    project,
    project_pair,
)

TILE = 32
"""Rows that the processor's matrix unit takes at once, and a multiple of the vectors' length:
attention over 160 tokens takes two thirds of the time that it takes over 168."""


class Pass(threading.local):
    """What the next forward pass is told, by each thread for itself."""

    padding_bias: Float[Tensor, "batch columns"] | None = None
    """Added to the scores of the text tokens: how many each one stands for, as a logarithm."""
    num_targets: int | None = None
    """How many picture tokens, the first ones, the last block answers for; None: all. It gives
    zeros for the others."""


class QuickBlocks:
    """Handle of `quicken`."""

    def __init__(self, transformer: Step1XEditTransformer2DModel) -> None:
        self.own = Pass()
        self._blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        last = self._blocks[-1]
        for block in self._blocks:
            if isinstance(block, Step1XEditTransformerBlock):
                block.forward = partial(self._double, block)
            elif isinstance(block, Step1XEditSingleTransformerBlock):
                block.forward = partial(self._single, block, is_last=block is last)

    def remove(self) -> None:
        """Give the blocks their own `forward` back."""
        for block in self._blocks:
            del block.forward

    def trim(self, features: InstructionFeatures, num_image: int) -> InstructionFeatures:
        """Cut padding off that no row of the batch needs, and remember what the rest stands for.

        A row keeps one padding token at least, if it has any.

        Args:
            features: Of the instructions.
            num_image: Picture tokens beside them; all together become a multiple of `TILE`, if
                there is that much padding.
        """
        lengths = features.mask.sum(1)
        full = features.mask.shape[1]
        tiles = math.ceil((int(lengths.max()) + 1 + num_image) / TILE)
        kept = min(full, tiles * TILE - num_image)
        share = (full - lengths).clamp(min=1) / (kept - lengths).clamp(min=1)
        mask = features.mask[:, :kept]
        self.own.padding_bias = share.log()[:, None] * ~mask if kept < full else None
        return InstructionFeatures(features.features[:, :kept], mask)

    def _double(
        self,
        block: Step1XEditTransformerBlock,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tensor,
    ) -> tuple[Tensor, Tensor]:
        attn: Any = block.attn
        image, text = hidden_states, encoder_hidden_states
        num_text = text.shape[1]
        shift, scale, gate, *image_mlp = _chunks(block.norm1.linear, temb, 6)
        c_shift, c_scale, c_gate, *text_mlp = _chunks(block.norm1_context.linear, temb, 6)
        image_in = modulated_norm(image, shift, scale)
        text_in = modulated_norm(text, c_shift, c_scale)
        attended = attend(
            torch.cat([project(text_in, attn.add_q_proj), project(image_in, attn.to_q)], 1),
            torch.cat(
                [
                    project(text_in, attn.add_k_proj, attn.add_v_proj),
                    project(image_in, attn.to_k, attn.to_v),
                ],
                1,
            ),
            _weights((attn.norm_added_q, num_text), (attn.norm_q, image.shape[1]))
            * attn.head_dim**-0.5,
            _weights((attn.norm_added_k, num_text), (attn.norm_k, image.shape[1])),
            image_rotary_emb,
            image_rotary_emb,
            self.own.padding_bias,
        )
        text_out, image_out = attended.split([num_text, image.shape[1]], 1)
        text = gated_sum(text, c_gate, project(text_out, attn.to_add_out))
        image = gated_sum(image, gate, project(image_out, attn.to_out[0]))
        return (
            _feed_forward(block.ff_context, text, *text_mlp),
            _feed_forward(block.ff, image, *image_mlp),
        )

    def _single(
        self,
        block: Step1XEditSingleTransformerBlock,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tensor,
        *,
        is_last: bool,
    ) -> tuple[Tensor, Tensor]:
        attn: Any = block.attn
        num_text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], 1)
        asked = slice(None)
        if is_last and self.own.num_targets is not None:
            asked = slice(num_text, num_text + self.own.num_targets)
        shift, scale, gate = _chunks(block.norm.linear, temb, 3)
        normed = modulated_norm(tokens, shift, scale)
        query_table = image_rotary_emb[asked]
        asking = normed[:, asked].contiguous()
        attended = attend(
            project(asking, attn.to_q),
            project(normed, attn.to_k, attn.to_v),
            _weights((attn.norm_q, len(query_table))) * attn.head_dim**-0.5,
            _weights((attn.norm_k, tokens.shape[1])),
            image_rotary_emb,
            query_table,
            self.own.padding_bias,
        )
        hidden = block.act_mlp(project(asking, block.proj_mlp))
        update = project_pair(attended, hidden, block.proj_out)
        out = gated_sum(tokens[:, asked], gate, update)
        if out.shape[1] < tokens.shape[1]:
            rest = hidden_states.shape[1] - out.shape[1]
            return encoder_hidden_states, nn.functional.pad(out, (0, 0, 0, rest))
        text, image = out.split([num_text, hidden_states.shape[1]], 1)
        return text, image


def can_quicken() -> bool:
    """Whether torch has the product, and the processor multiplies bfloat16 matrices."""
    has_product = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_product and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def quicken(transformer: Step1XEditTransformer2DModel) -> QuickBlocks:
    """Exchange the blocks' `forward`; `remove` of what is returned takes that back.

    For bfloat16 autocast on a CPU, with one table of positions for all rows.
    """
    return QuickBlocks(transformer)


def _chunks(linear: nn.Linear, temb: Tensor, count: int) -> tuple[Tensor, ...]:
    return linear(temb)[:, None].chunk(count, -1)


def _weights(*norms: tuple[nn.Module, int]) -> Float[Tensor, "tokens 1 head_dim"]:
    """The norms' weights, token by token."""
    return torch.cat([norm.weight.expand(count, 1, -1) for norm, count in norms])  # pyright: ignore[reportCallIssue]


def _feed_forward(
    layers: Any, tokens: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    gelu, last = layers.net[0], layers.net[2]
    hidden = project(modulated_norm(tokens, shift, scale), gelu.proj)
    hidden = nn.functional.gelu(hidden, approximate=gelu.approximate)
    return gated_sum(tokens, gate, project(hidden, last))
