"""Blocks of the diffusion transformer: FLUX's double and single stream (Black Forest Labs 2024).

Parameter names are those of the published diffusers-layout folders. Attention goes through
diffusers' dispatcher, so that its backends can be switched from outside.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from jaxtyping import Complex64, Float
from torch import Tensor, nn

ROTARY_THETA = 10000
MLP_RATIO = 4
EPS = 1e-6


def rotary_table(
    ids: Float[Tensor, "*batch tokens axes"], axes_dims: tuple[int, ...] | list[int]
) -> Complex64[Tensor, "*batch tokens 1 pairs"]:
    """Unit complex numbers that turn each channel pair of a head by its token's position.

    Rotary position embedding (Su et al. 2021) over several axes, as in FLUX: axis i owns
    `axes_dims[i]` neighbouring channels. Computed in float64, because positions times frequencies
    lose digits in float32.

    Args:
        ids: Position of every token on every axis, one table for all rows or one per row.
        axes_dims: Channels per axis, even, in sum the head dimension.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles.append(ids[..., axis, None].double() * ROTARY_THETA**-exponents)
    angle = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).unsqueeze(-2)


class RotaryRMSNorm(nn.Module):
    """RMS norm over a head's channels, then the rotary turn of its interleaved channel pairs."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(
        self,
        heads: Float[Tensor, "batch tokens heads dim"],
        table: Complex64[Tensor, "*batch tokens 1 pairs"],
    ) -> Float[Tensor, "batch tokens heads dim"]:
        """Normalise and turn in float32, return in the dtype of `heads`."""
        wide = heads.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)
        wide = wide * self.weight.float()
        turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * table
        return torch.view_as_real(turned).flatten(-2).to(heads.dtype)


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


class Step1XEditAttnProcessor:
    """Joint attention through diffusers' dispatcher, so that its backends can be switched."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Step1XEditAttention,
        hidden_states: Float[Tensor, "batch image dim"],
        encoder_hidden_states: Float[Tensor, "batch text dim"] | None,
        image_rotary_emb: Complex64[Tensor, "*batch tokens 1 pairs"],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend over text and picture tokens together.

        Args:
            attn: The module that owns the weights.
            hidden_states: Picture tokens, or all tokens in a single-stream block.
            encoder_hidden_states: Text tokens in a double-stream block, else None.
            image_rotary_emb: Table of `rotary_table` over text, then picture tokens.

        Returns:
            Picture and text output, projected; in a single-stream block the raw attention output.
        """
        text_tokens = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        text_table, image_table = (
            image_rotary_emb[..., :text_tokens, :, :],
            image_rotary_emb[..., text_tokens:, :, :],
        )
        heads = (-1, attn.head_dim)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, heads), image_table)
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, heads), image_table)
        value = attn.to_v(hidden_states).unflatten(-1, heads)
        if encoder_hidden_states is not None:
            text_query = attn.add_q_proj(encoder_hidden_states).unflatten(-1, heads)
            text_key = attn.add_k_proj(encoder_hidden_states).unflatten(-1, heads)
            text_value = attn.add_v_proj(encoder_hidden_states).unflatten(-1, heads)
            query = torch.cat([attn.norm_added_q(text_query, text_table), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key, text_table), key], dim=1)
            value = torch.cat([text_value, value], dim=1)

        attended = dispatch_attention_fn(
            query,
            key,
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2)  # (B, N, D)
        if encoder_hidden_states is None:
            return attended
        text, image = attended.split([text_tokens, attended.shape[1] - text_tokens], dim=1)
        return attn.to_out[0](image), attn.to_add_out(text)


class Step1XEditAttention(nn.Module, AttentionModuleMixin):
    """Weights of one joint attention; `two_streams` adds the text stream's own projections."""

    _default_processor_cls = Step1XEditAttnProcessor
    _available_processors: ClassVar[list[type]] = [Step1XEditAttnProcessor]
    # The fused module would not carry LoRA layers, and one projection per call is as fast here.
    _supports_qkv_fusion = False

    def __init__(self, dim: int, head_dim: int, two_streams: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.heads = dim // head_dim
        self.norm_q = RotaryRMSNorm(head_dim)
        self.norm_k = RotaryRMSNorm(head_dim)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        if two_streams:
            self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
            self.norm_added_q = RotaryRMSNorm(head_dim)
            self.norm_added_k = RotaryRMSNorm(head_dim)
            self.add_q_proj = nn.Linear(dim, dim)
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.to_add_out = nn.Linear(dim, dim)
        self.set_processor(cast("Any", Step1XEditAttnProcessor()))

    def forward(
        self,
        hidden_states: Float[Tensor, "batch image dim"],
        encoder_hidden_states: Float[Tensor, "batch text dim"] | None,
        image_rotary_emb: Complex64[Tensor, "*batch tokens 1 pairs"],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See `Step1XEditAttnProcessor`."""
        return cast("Any", self.processor)(
            self, hidden_states, encoder_hidden_states, image_rotary_emb
        )


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
