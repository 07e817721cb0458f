"""The transformer's blocks in the form that trains fastest on a CPU; the network stays as it is.

`quicken` gives every block another `forward` over the same parameters, made of `quick_ops`. Besides
that, two kinds of work are left out that no result depends on: padding tokens of a sample are all
alike in every block, so that a few of them stand for all, with their weight in the attention; and
the last block answers for the tokens alone whose velocity is asked for. Losses and gradients are
the plain form's to bfloat16 rounding.
"""

from __future__ import annotations

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
from step1x_edit.training.packing import Packing, divide, join
from step1x_edit.training.quick_ops import (
    attend,
    gated_sum,
    modulated_norm,
    project,
    project_pair,
)

GROUP_TOKENS = 512
"""Picture tokens of a group of rows, which have one length and are worked on together between
products: at the mini's width a tensor of theirs is 1 MiB in bfloat16, half of a core's cache."""
TILE = 4
"""The length of a row's text is a multiple of this."""


class Pass(threading.local):
    """What the next forward pass is told, by each thread for itself."""

    packing: Packing
    padding_bias: tuple[Float[Tensor, "_ _"], ...]
    """Added to the scores of each group's text tokens: how many each one stands for, as a
    logarithm."""
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

        A row keeps one padding token at least, if it has any. Rows that are sorted by length keep
        least; the forward pass must follow in the same thread.

        Args:
            features: Of the instructions.
            num_image: Picture tokens beside them.
        """
        lengths = features.mask.sum(1)
        batch, full = features.mask.shape
        group = max(1, GROUP_TOKENS // num_image)
        rows = tuple(slice(i, min(i + group, batch)) for i in range(0, batch, group))
        longest = [int(lengths[own].max()) for own in rows]
        text = tuple(min(full, TILE * (length // TILE + 1)) for length in longest)
        self.own.packing = Packing(rows, text, num_image)
        biases = []
        for own, kept in zip(rows, text, strict=True):
            padding = [(count - lengths[own]).clamp(min=1) for count in (full, kept)]
            share = (padding[0] / padding[1]).log()
            biases.append(share[:, None] * ~features.mask[own, :kept])
        self.own.padding_bias = tuple(biases)
        return InstructionFeatures(features.features[:, : max(text)], features.mask[:, : max(text)])

    def _packed(self, text: Tensor) -> Tensor:
        """The first block is given padded text, the others have it from the one before."""
        return self.own.packing.only_text().pack(text) if text.ndim > 2 else text

    def _double(
        self,
        block: Step1XEditTransformerBlock,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tensor,
    ) -> tuple[Tensor, Tensor]:
        attn: Any = block.attn
        packing = self.own.packing
        texts, images = packing.only_text(), packing.only_image()
        text, image = self._packed(encoder_hidden_states), hidden_states.flatten(0, 1)
        shift, scale, gate, *image_mlp = _chunks(block.norm1.linear, temb, 6)
        c_shift, c_scale, c_gate, *text_mlp = _chunks(block.norm1_context.linear, temb, 6)
        image_in = modulated_norm(image, shift, scale, images)
        text_in = modulated_norm(text, c_shift, c_scale, texts)
        attended = attend(
            join(project(text_in, attn.add_q_proj), project(image_in, attn.to_q), packing),
            join(
                project(text_in, attn.add_k_proj, attn.add_v_proj),
                project(image_in, attn.to_k, attn.to_v),
                packing,
            ),
            torch.stack([attn.norm_added_q.weight, attn.norm_q.weight]) * attn.head_dim**-0.5,
            torch.stack([attn.norm_added_k.weight, attn.norm_k.weight]),
            image_rotary_emb,
            packing,
            packing,
            self.own.padding_bias,
        )
        text_out, image_out = divide(attended, packing)
        text = gated_sum(text, c_gate, project(text_out, attn.to_add_out), texts)
        image = gated_sum(image, gate, project(image_out, attn.to_out[0]), images)
        return (
            _feed_forward(block.ff_context, text, texts, *text_mlp),
            _feed_forward(block.ff, image, images, *image_mlp).view_as(hidden_states),
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
        packing = asking = self.own.packing
        text = self._packed(encoder_hidden_states)
        tokens = join(text, hidden_states.flatten(0, 1), packing)
        shift, scale, gate = _chunks(block.norm.linear, temb, 3)
        normed = asked = modulated_norm(tokens, shift, scale, packing)
        num_targets = self.own.num_targets if is_last else None
        if num_targets is not None:
            asking = packing.only_image(num_targets)
            image_in = divide(normed, packing)[1].view_as(hidden_states)
            asked, tokens = asking.pack(image_in), asking.pack(hidden_states)
        query_norms, key_norms = (
            torch.stack([norm.weight] * 2) for norm in (attn.norm_q, attn.norm_k)
        )
        attended = attend(
            project(asked, attn.to_q),
            project(normed, attn.to_k, attn.to_v),
            query_norms * attn.head_dim**-0.5,
            key_norms,
            image_rotary_emb,
            asking,
            packing,
            self.own.padding_bias,
        )
        hidden = block.act_mlp(project(asked, block.proj_mlp))
        update = project_pair(attended, hidden, block.proj_out)
        out = gated_sum(tokens, gate, update, asking)
        if num_targets is not None:
            targets = out.unflatten(0, (len(hidden_states), num_targets))
            rest = hidden_states.shape[1] - num_targets
            return text, nn.functional.pad(targets, (0, 0, 0, rest))
        text, image = divide(out, packing)
        return text, image.view_as(hidden_states)


def can_quicken() -> bool:
    """Whether torch has the product, and the processor multiplies bfloat16 matrices."""
    has_product = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_product and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def quicken(transformer: Step1XEditTransformer2DModel) -> QuickBlocks:
    """Exchange the blocks' `forward`; `remove` of what is returned takes that back.

    For bfloat16 autocast on a CPU, with one table of positions for all rows; `trim` comes before
    each forward pass.
    """
    return QuickBlocks(transformer)


def _chunks(linear: nn.Linear, temb: Tensor, count: int) -> tuple[Tensor, ...]:
    return linear(temb)[:, None].chunk(count, -1)


def _feed_forward(
    layers: Any, tokens: Tensor, packing: Packing, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    gelu, last = layers.net[0], layers.net[2]
    hidden = project(modulated_norm(tokens, shift, scale, packing), gelu.proj)
    hidden = nn.functional.gelu(hidden, approximate=gelu.approximate)
    return gated_sum(tokens, gate, project(hidden, last), packing)
