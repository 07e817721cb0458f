"""Qwen2.5-VL's vision tower for many small pictures on a CPU: the same weights, one call for all.

transformers runs attention window by window and embeds patches by a `Conv3d`, whose bf16 backward
costs over a hundred times the matrix product that it stands for. For a training batch of thumbnails
that is most of the tower's time. The trainer calls `batch_vision`; parameter names stay, so
checkpoints do not change.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)


def batch_vision(text_encoder: Qwen2_5_VLForConditionalGeneration) -> None:
    """Exchange the vision tower's patch embedding and attention in place.

    Results agree with the stock modules to rounding.
    """
    visual: Any = text_encoder.model.visual  # its annotations name the stock modules
    visual.patch_embed = PatchProjection(visual.patch_embed)
    for block in visual.blocks:
        block.attn = BatchedVisionAttention(block.attn)


class PatchProjection(nn.Module):
    """A patch embedding as a matrix product: its convolution's stride equals its kernel."""

    def __init__(self, stock: Qwen2_5_VisionPatchEmbed) -> None:
        super().__init__()
        self.proj = stock.proj

    def forward(
        self, hidden_states: Float[Tensor, "patches values"]
    ) -> Float[Tensor, "patches width"]:
        """Embed flat patches."""
        weight = self.proj.weight.flatten(1)
        return nn.functional.linear(hidden_states.to(weight.dtype), weight)


class BatchedVisionAttention(nn.Module):
    """Full attention within windows, all of them in one product where they are equally long."""

    def __init__(self, stock: Qwen2_5_VLVisionAttention) -> None:
        super().__init__()
        self.qkv, self.proj = stock.qkv, stock.proj
        self.num_heads, self.scaling = stock.num_heads, stock.scaling

    def forward(
        self,
        hidden_states: Float[Tensor, "patches width"],
        cu_seqlens: Int[Tensor, " windows_and_one"],
        position_embeddings: tuple[Tensor, Tensor],
        **_: Any,
    ) -> Float[Tensor, "patches width"]:
        """Attend within the windows that `cu_seqlens` bounds."""
        query, key, value = rearrange(
            self.qkv(hidden_states), "n (three h d) -> three n h d", three=3, h=self.num_heads
        )
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        lengths = cu_seqlens.diff().tolist()
        if len(set(lengths)) == 1:
            out = self._attend(query, key, value, lengths[0])
        else:
            windows = zip(
                query.split(lengths), key.split(lengths), value.split(lengths), strict=True
            )
            out = torch.cat([self._attend(q, k, v, len(q)) for q, k, v in windows])
        return self.proj(out)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        query, key, value = (
            rearrange(part, "(w n) h d -> w h n d", n=length) for part in (query, key, value)
        )
        # Written out: on a CPU the backward of the fused bf16 kernel costs ten times as much at
        # these lengths.
        weights = (query @ key.transpose(-1, -2) * self.scaling).softmax(-1, dtype=torch.float32)
        return rearrange(weights.to(value.dtype) @ value, "w h n d -> (w n) (h d)")
