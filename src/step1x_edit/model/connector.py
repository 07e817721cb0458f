"""The connector: turns the instruction encoder's features into what the transformer reads.

It refines the features of the multimodal language model with two gated attention blocks that see
the timestep, and sums them up in one pooled vector. Its weights are part of the transformer's file
and `Step1XEditTransformer2DModel.forward` runs it at every step. Architecture and names after the
released Step1X-Edit (arXiv 2504.17761, section 3).
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from step1x_edit.model.attention import attend_by_matmul, prefers_matmul

TIMESTEP_FACTOR = 1000.0
"""Networks see timesteps on the 0..1000 scale on which diffusion models were first trained."""


def sinusoid(timestep: Float[Tensor, " batch"], dim: int) -> Float[Tensor, "batch dim"]:
    """Cosines, then sines, of a timestep at geometrically spaced frequencies.

    Args:
        timestep: Flow-matching time in [0, 1]; multiplied by 1000 here.
        dim: Number of features, even.

    Returns:
        float32 features, whatever the dtype of `timestep`: bfloat16 could not tell neighbouring
        timesteps apart. Formula of Vaswani et al. 2017 in the order that the release uses.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(-math.log(10000.0) * exponents / half)
    angles = (TIMESTEP_FACTOR * timestep.float())[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Timestep to a conditioning vector: sinusoid, linear, SiLU, linear."""

    def __init__(self, frequency_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(
            nn.Linear(frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(
        self, timestep: Float[Tensor, " batch"], dtype: torch.dtype
    ) -> Float[Tensor, "batch hidden"]:
        """Embed `timestep` (in [0, 1]); the linear layers run in `dtype`."""
        return self.mlp(sinusoid(timestep, self.frequency_dim).to(dtype))


class TextProjection(nn.Module):
    """The mean feature to a conditioning vector: linear, SiLU, linear."""

    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch hidden"]:
        """Project `features`."""
        return self.linear_2(silu(self.linear_1(features)))


class RefinerMLP(nn.Module):
    """Two linear layers with a SiLU between them."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, tokens: Float[Tensor, "batch tokens hidden"]) -> Tensor:
        """Apply to every token alone."""
        return self.fc2(silu(self.fc1(tokens)))


class RefinerBlock(nn.Module):
    """Self-attention and MLP over the text tokens, each gated by the conditioning vector."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.self_attn_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.self_attn_proj = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = RefinerMLP(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens hidden"],
        condition: Float[Tensor, "batch hidden"],
        attention_mask: Bool[Tensor, "batch 1 tokens tokens"],
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Refine `tokens`; `attention_mask` says which column each row may see."""
        attn_gate, mlp_gate = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        qkv = self.self_attn_qkv(self.norm1(tokens))
        query, key, value = rearrange(qkv, "b n (k h d) -> k b h n d", k=3, h=self.num_heads)
        if prefers_matmul(query):
            attended = attend_by_matmul(query, key, value, attention_mask)
        else:
            attended = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        attended = self.self_attn_proj(rearrange(attended, "b h n d -> b n (h d)"))
        tokens = torch.addcmul(tokens, attn_gate, attended)
        return torch.addcmul(tokens, mlp_gate, self.mlp(self.norm2(tokens)))


class IndividualTokenRefiner(nn.Module):
    """The stack of refiner blocks with its attention mask."""

    def __init__(self, hidden_size: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(hidden_size, num_heads) for _ in range(depth))

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens hidden"],
        condition: Float[Tensor, "batch hidden"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Refine `tokens`. Real tokens see real tokens; column 0 is open to all.

        Padding rows therefore read token 0 alone. They matter: the transformer attends to them.
        """
        attention_mask = mask[:, None, :, None] & mask[:, None, None, :]
        attention_mask[..., 0] = True
        for block in self.blocks:
            tokens = block(tokens, condition, attention_mask)
        return tokens


class SingleTokenRefiner(nn.Module):
    """Input projection, conditioning vector (time and mean feature) and the refiner stack."""

    def __init__(
        self, in_channels: int, hidden_size: int, num_heads: int, depth: int, timestep_dim: int
    ) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(timestep_dim, hidden_size)
        self.c_embedder = TextProjection(in_channels, hidden_size)
        self.individual_token_refiner = IndividualTokenRefiner(hidden_size, num_heads, depth)

    def forward(
        self,
        features: Float[Tensor, "batch tokens channels"],
        mean_feature: Float[Tensor, "batch channels"],
        timestep: Float[Tensor, " batch"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Refine `features` at `timestep` in [0, 1]."""
        condition = self.t_embedder(timestep, features.dtype) + self.c_embedder(mean_feature)
        return self.individual_token_refiner(self.input_embedder(features), condition, mask)


class Connector(nn.Module):
    """Instruction features to the transformer's context tokens and pooled vector.

    Args:
        in_channels: Width of the instruction encoder's features.
        hidden_size: Width of the refiner and of the context tokens.
        num_heads: Attention heads of the refiner.
        depth: Number of refiner blocks.
        pooled_dim: Width of the pooled vector.
        timestep_dim: Number of sinusoid features of the timestep.
        scale_factor: Whether the mean feature is scaled by a learnt `1 + scale_factor` before it is
            projected to the pooled vector (v1.0) or not (v1.1).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        num_heads: int,
        depth: int,
        pooled_dim: int,
        timestep_dim: int = 256,
        scale_factor: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"connector_hidden_size {hidden_size} is not a multiple of connector_heads_num "
                f"{num_heads}"
            )
        self.S = SingleTokenRefiner(in_channels, hidden_size, num_heads, depth, timestep_dim)
        self.global_proj_out = nn.Linear(in_channels, pooled_dim)
        self.scale_factor = nn.Parameter(torch.zeros(1)) if scale_factor else None

    def forward(
        self,
        features: Float[Tensor, "batch tokens channels"],
        timestep: Float[Tensor, " batch"],
        mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
    ) -> tuple[Float[Tensor, "batch tokens hidden"], Float[Tensor, "batch pooled"]]:
        """Refine and pool.

        Args:
            features: Last hidden states of the instruction encoder, zero-padded.
            timestep: Flow-matching time in [0, 1].
            mask: Non-zero at real tokens.

        Returns:
            Context tokens (padding included) and the pooled vector.
        """
        mask = mask.bool()
        weights = mask.to(features.dtype)
        # An unconditional row may hold no token at all: its mean is then zero, not NaN.
        counts = weights.sum(dim=1, keepdim=True).clamp(min=1)
        mean_feature = torch.bmm(weights[:, None], features)[:, 0] / counts
        pooled_feature = mean_feature
        if self.scale_factor is not None:
            pooled_feature = mean_feature * (1 + self.scale_factor)
        context = self.S(features, mean_feature, timestep, mask)
        return context, self.global_proj_out(pooled_feature)
