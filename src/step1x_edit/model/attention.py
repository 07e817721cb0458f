"""Joint attention of the transformer: rotary positions, normalised queries and keys, dispatch.

Attention goes through diffusers' dispatcher, so that backends, context parallelism and the hooks
that look for attention modules work. The blocks use all of it, the connector only the products.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils.torch_utils import maybe_adjust_dtype_for_device
from jaxtyping import Bool, Complex64, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROTARY_THETA = 10000
EPS = 1e-6

MATMUL_MAX_TOKENS = 1024
"""Up to here three plain matrix products train faster on a CPU than the fused kernel does."""


def rotary_table(
    ids: Float[Tensor, "*batch tokens axes"], axes_dims: tuple[int, ...] | list[int]
) -> Complex64[Tensor, "*batch tokens 1 pairs"]:
    """Unit complex numbers that turn each channel pair of a head by its token's position.

    Rotary position embedding (Su et al. 2021) over several axes, as in FLUX: axis i owns
    `axes_dims[i]` neighbouring channels. Computed in float64 where the device has it, because
    positions times frequencies lose digits in float32.

    Args:
        ids: Position of every token on every axis, one table for all rows or one per row.
        axes_dims: Channels per axis, even, in sum the head dimension.
    """
    dtype = maybe_adjust_dtype_for_device(torch.float64, ids.device)
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim
        angles.append(ids[..., axis, None].to(dtype) * ROTARY_THETA**-exponents)
    angle = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).unsqueeze(-2)


def _as_pairs(heads: Tensor) -> Tensor:
    """View float32 channels (..., 2 p) as complex pairs (..., p): real, imaginary, real, ..."""
    return torch.view_as_complex(heads.unflatten(-1, (-1, 2)))


class _RotaryRMSNorm(torch.autograd.Function):
    """Norm and turn in one step that keeps only its input: half the passes of the plain form."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, weight: Tensor, table: Tensor) -> Tensor:
        wide = heads.to(torch.float32, copy=True)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse_rms = square.div_(heads.shape[-1]).add_(EPS).rsqrt_()
        wide.mul_(inverse_rms).mul_(weight)
        _as_pairs(wide).mul_(table)
        ctx.save_for_backward(heads, weight, table, inverse_rms)
        return wide.to(heads.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's own way to write it
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        (grad,) = grad_outputs
        heads, weight, table, inverse_rms = ctx.saved_tensors
        normed = heads * inverse_rms  # float32
        grad_wide = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        _as_pairs(grad_wide).mul_(table.conj())  # turned back
        product = grad_wide * normed
        grad_weight = product.sum(dim=tuple(range(product.ndim - 1)))
        # The norm lets no gradient through along its own direction.
        along = (product @ weight.to(torch.float32)).div_(-heads.shape[-1]).unsqueeze(-1)
        grad_wide.mul_(weight).addcmul_(normed, along).mul_(inverse_rms)
        return grad_wide.to(heads.dtype), grad_weight.to(weight.dtype), None


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
        return cast("Tensor", _RotaryRMSNorm.apply(heads, self.weight, table))


def prefers_matmul(query: Float[Tensor, "batch heads tokens dim"]) -> bool:
    """Whether `attend_by_matmul` beats torch's fused kernel for these queries.

    It does where a CPU has to differentiate short bfloat16 sequences: there the fused backward is
    several times slower than matrix products. Everywhere else the fused kernel is at least equal.
    """
    return (
        query.requires_grad
        and query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[2] <= MATMUL_MAX_TOKENS
    )


def attend_by_matmul(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens dim"],
    mask: Bool[Tensor, "batch 1 tokens tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens dim"]:
    """Scaled dot-product attention in plain matrix products.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        mask: True where a row may see a column; every row must see one.
    """
    batch, _, _, dim = query.shape
    query, key, value = (part.flatten(0, 1) for part in (query, key, value))
    scores = torch.baddbmm(query.new_zeros(()), query, key.transpose(1, 2), beta=0, alpha=dim**-0.5)
    if mask is not None:
        scores.unflatten(0, (batch, -1)).masked_fill_(~mask, -torch.inf)
    attended = torch.bmm(scores.softmax(dim=-1), value)  # (B H, N, D)
    return attended.unflatten(0, (batch, -1))


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
        num_text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        image_table = image_rotary_emb[..., num_text:, :, :]
        heads = (-1, attn.head_dim)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, heads), image_table)
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, heads), image_table)
        value = attn.to_v(hidden_states).unflatten(-1, heads)
        if encoder_hidden_states is not None:
            text_table = image_rotary_emb[..., :num_text, :, :]
            text_query = attn.add_q_proj(encoder_hidden_states).unflatten(-1, heads)
            text_key = attn.add_k_proj(encoder_hidden_states).unflatten(-1, heads)
            text_value = attn.add_v_proj(encoder_hidden_states).unflatten(-1, heads)
            query = torch.cat([attn.norm_added_q(text_query, text_table), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key, text_table), key], dim=1)
            value = torch.cat([text_value, value], dim=1)

        attended = self._attend(query, key, value).flatten(2)  # (B, N, D)
        if encoder_hidden_states is None:
            return attended
        text, image = attended.split([num_text, attended.shape[1] - num_text], dim=1)
        return attn.to_out[0](image), attn.to_add_out(text)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._attention_backend is None and self._parallel_config is None:
            swapped = [part.transpose(1, 2) for part in (query, key, value)]
            if prefers_matmul(swapped[0]):
                return attend_by_matmul(*swapped).transpose(1, 2)
        return dispatch_attention_fn(
            query,
            key,
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


class Step1XEditAttention(nn.Module, AttentionModuleMixin):
    """Weights of one joint attention; `two_streams` adds the text stream's own projections."""

    _default_processor_cls = Step1XEditAttnProcessor
    _available_processors: ClassVar[list[type]] = [Step1XEditAttnProcessor]
    # Fusing would rename the projections that LoRA files and the layout table address.
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
