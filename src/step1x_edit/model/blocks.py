"""Blocks of the diffusion transformer: FLUX's double and single stream (Black Forest Labs 2024).

Parameter names are those of the published diffusers-layout folders; `attention` holds the joint
attention, `transformer` the stack.
"""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from jaxtyping import Complex64, Float
from torch import Tensor, nn

from step1x_edit.model.attention import EPS, Step1XEditAttention

MLP_RATIO = 4


class AdaLayerNorm(nn.Module):
    """Layer norm whose shift and scale come from the conditioning vector.

    Args:
        dim: Width of tokens and of the conditioning vector.
        num_chunks: How many vectors `linear` makes. The first two are shift and scale; the rest are
            handed to the caller.
    """

    def __init__(self, dim: int, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(dim, num_chunks * dim)
        self.norm = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], temb: Float[Tensor, "batch dim"]
    ) -> tuple[Tensor, ...]:
        """Return the modulated tokens and the remaining chunks, each (batch, 1, dim).

        `temb` has been through its SiLU already: all blocks share that one activation.
        """
        shift, scale, *rest = self.linear(temb)[:, None].chunk(self.num_chunks, dim=-1)
        return torch.addcmul(shift, self.norm(tokens), 1 + scale), *rest


class AdaLayerNormOut(nn.Module):
    """The last layer norm; scale stands before shift here, as in the diffusers layout."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], temb: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Modulate `tokens`; `temb` has been through its SiLU already."""
        scale, shift = self.linear(temb)[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(tokens), 1 + scale)


class VectorEmbedder(nn.Module):
    """Linear, SiLU, linear: a feature vector into the conditioning vector."""

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch hidden"]:
        """Embed `features`."""
        return self.out_layer(nn.functional.silu(self.in_layer(features)))


class Step1XEditTransformerBlock(nn.Module):
    """Double-stream block: text and picture have their own weights and attend together."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(dim, num_chunks=6)
        self.norm1_context = AdaLayerNorm(dim, num_chunks=6)
        self.attn = Step1XEditAttention(dim, head_dim, two_streams=True)
        self.norm2 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.ff = FeedForward(dim, mult=MLP_RATIO, activation_fn="gelu-approximate")
        self.norm2_context = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.ff_context = FeedForward(dim, mult=MLP_RATIO, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: Float[Tensor, "batch image dim"],
        encoder_hidden_states: Float[Tensor, "batch text dim"],
        temb: Float[Tensor, "batch dim"],
        image_rotary_emb: Complex64[Tensor, "*batch tokens 1 pairs"],
    ) -> tuple[Float[Tensor, "batch text dim"], Float[Tensor, "batch image dim"]]:
        """Return text tokens, then picture tokens (the order of diffusers' FLUX blocks)."""
        image, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, temb)
        text, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(
            encoder_hidden_states, temb
        )
        image, text = self.attn(image, text, image_rotary_emb)

        hidden_states = torch.addcmul(hidden_states, gate, image)
        image = torch.addcmul(shift_mlp, self.norm2(hidden_states), 1 + scale_mlp)
        hidden_states = torch.addcmul(hidden_states, gate_mlp, self.ff(image))

        encoder_hidden_states = torch.addcmul(encoder_hidden_states, c_gate, text)
        text = torch.addcmul(
            c_shift_mlp, self.norm2_context(encoder_hidden_states), 1 + c_scale_mlp
        )
        encoder_hidden_states = torch.addcmul(
            encoder_hidden_states, c_gate_mlp, self.ff_context(text)
        )
        return encoder_hidden_states, hidden_states


class Step1XEditSingleTransformerBlock(nn.Module):
    """Single-stream block: attention and MLP side by side over text and picture tokens."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.norm = AdaLayerNorm(dim, num_chunks=3)
        self.proj_mlp = nn.Linear(dim, MLP_RATIO * dim)
        self.act_mlp = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear((1 + MLP_RATIO) * dim, dim)
        self.attn = Step1XEditAttention(dim, head_dim, two_streams=False)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch image dim"],
        encoder_hidden_states: Float[Tensor, "batch text dim"],
        temb: Float[Tensor, "batch dim"],
        image_rotary_emb: Complex64[Tensor, "*batch tokens 1 pairs"],
    ) -> tuple[Float[Tensor, "batch text dim"], Float[Tensor, "batch image dim"]]:
        """Return text tokens, then picture tokens (the order of diffusers' FLUX blocks)."""
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(tokens, temb)
        attended = self.attn(normed, None, image_rotary_emb)
        branches = torch.cat([attended, self.act_mlp(self.proj_mlp(normed))], dim=-1)
        tokens = torch.addcmul(tokens, gate, self.proj_out(branches))
        text, image = tokens.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return text, image
