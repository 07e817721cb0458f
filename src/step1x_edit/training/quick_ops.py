"""Parts of a transformer block as single steps of autograd, for training on a CPU in bfloat16.

The plain form writes every intermediate value of a whole batch to memory and reads it again; a few
samples' worth of them fits a core's cache. What happens between two matrix products over all
tokens is done here a few samples at a time, forwards and backwards, and written once, in the layout
that the next product reads. Values and gradients are the plain form's to bfloat16 rounding. Called
by `quick_blocks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Complex64, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from step1x_edit.model.attention import EPS

CHUNK_VALUES = 2**19
"""Values of one tensor that are worked on at a time: 1 MiB in bfloat16, half of a core's cache."""


def chunks(batch: int, values: int) -> Iterator[slice]:
    """Cut `batch` samples of `values` values each into slices that fit the cache."""
    size = max(1, CHUNK_VALUES // values)
    return (slice(start, start + size) for start in range(0, batch, size))


def _linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The product that `torch.compile` uses: `linear` writes the bias out first and reads it back,
    # which costs half as much again at these sizes.
    return torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, "none", [], "")


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[::2], parameters[1::2]
        weight = torch.cat([part.to(tokens.dtype) for part in weights])
        bias = torch.cat([part.to(tokens.dtype) for part in biases])
        ctx.save_for_backward(tokens, weight)
        ctx.sizes = [len(part) for part in weights]
        return _linear(tokens, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's own way to write it
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        grad = grad_outputs[0].flatten(0, -2)
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if ctx.needs_input_grad[0]:
            grads[0] = (grad @ weight).view(tokens.shape)
        if any(ctx.needs_input_grad[1:]):
            grad_weight = _outer(grad, tokens.flatten(0, -2))
            pairs = zip(grad_weight.split(ctx.sizes), grad.sum(0).split(ctx.sizes), strict=True)
            flat = (part for pair in pairs for part in pair)
            grads[1:] = [part.float() for part in flat]
        return tuple(grads)


def _outer(grad: Tensor, tokens: Tensor) -> Tensor:
    """``grad.T @ tokens``, whose narrower factor is turned first: the product's own way is slow."""
    if grad.shape[1] >= tokens.shape[1]:
        return (tokens.T.contiguous() @ grad).T.contiguous()
    return grad.T.contiguous() @ tokens


def project(
    tokens: Float[Tensor, "batch tokens dim"], *layers: nn.Linear
) -> Float[Tensor, "batch tokens outs"]:
    """Outputs of linear layers over the same tokens, side by side: one product for all of them."""
    parameters = [part for layer in layers for part in (layer.weight, layer.bias)]
    return cast("Tensor", _Project.apply(tokens.contiguous(), *parameters))


class _ProjectPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        widths = [first.shape[-1], second.shape[-1]]
        parts = [part.to(first.dtype).contiguous() for part in weight.split(widths, 1)]
        ctx.save_for_backward(first, second, *parts)
        out = _linear(second, parts[1], bias.to(first.dtype))
        return out.add_(_linear(first, parts[0], None))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first, second, *weights = ctx.saved_tensors
        grad = grad_outputs[0].flatten(0, -2)
        turned = grad.T.contiguous()
        grad_weight = torch.cat([turned @ part.flatten(0, -2) for part in (first, second)], 1)
        grads = [
            (grad @ weight).view(part.shape)
            for weight, part in zip(weights, (first, second), strict=True)
        ]
        return grads[0], grads[1], grad_weight.float(), grad.sum(0).float()


def project_pair(
    first: Float[Tensor, "batch tokens one"],
    second: Float[Tensor, "batch tokens two"],
    layer: nn.Linear,
) -> Float[Tensor, "batch tokens outs"]:
    """A linear layer over two inputs that its plain form would write side by side first."""
    return cast("Tensor", _ProjectPair.apply(first, second, layer.weight, layer.bias))


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        factor = 1 + scale
        out = torch.empty_like(tokens)
        statistics = []
        for part in chunks(len(tokens), tokens[0].numel()):
            normed, *own = torch.native_layer_norm(tokens[part], tokens.shape[-1:], None, None, EPS)
            torch.addcmul(shift[part], normed, factor[part], out=out[part])
            statistics.append(own)
        mean, rstd = (torch.cat(parts) for parts in zip(*statistics, strict=True))
        ctx.save_for_backward(tokens, factor, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, factor, mean, rstd = ctx.saved_tensors
        grad, shape = grad_outputs[0], tokens.shape[-1:]
        grad_tokens = torch.empty_like(tokens)
        grad_shift, grad_scale = torch.empty_like(factor), torch.empty_like(factor)
        for part in chunks(len(tokens), tokens[0].numel()):
            normed = torch.native_layer_norm(tokens[part], shape, None, None, EPS)[0]
            torch.sum(grad[part], 1, keepdim=True, out=grad_shift[part])
            torch.sum(normed.mul_(grad[part]), 1, keepdim=True, out=grad_scale[part])
            grad_tokens[part] = torch.ops.aten.native_layer_norm_backward(
                grad[part] * factor[part], tokens[part], shape, mean[part], rstd[part],
                None, None, [True, False, False],
            )[0]  # fmt: skip
        return grad_tokens, grad_shift, grad_scale


def modulated_norm(
    tokens: Float[Tensor, "batch tokens dim"],
    shift: Float[Tensor, "batch 1 dim"],
    scale: Float[Tensor, "batch 1 dim"],
) -> Float[Tensor, "batch tokens dim"]:
    """Layer norm without weights, times ``1 + scale``, plus `shift`."""
    return cast("Tensor", _ModulatedNorm.apply(tokens, shift, scale))


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gate: Tensor, update: Tensor) -> Tensor:
        ctx.save_for_backward(gate, update)
        return torch.addcmul(tokens, gate, update)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gate, update = ctx.saved_tensors
        grad = grad_outputs[0]
        grad_update, grad_gate = torch.empty_like(update), torch.empty_like(gate)
        for part in chunks(len(update), update[0].numel()):
            torch.mul(grad[part], gate[part], out=grad_update[part])
            torch.sum(grad[part] * update[part], 1, keepdim=True, out=grad_gate[part])
        return grad, grad_gate, grad_update


def gated_sum(
    tokens: Float[Tensor, "batch tokens dim"],
    gate: Float[Tensor, "batch 1 dim"],
    update: Float[Tensor, "batch tokens dim"],
) -> Float[Tensor, "batch tokens dim"]:
    """``tokens + gate * update``."""
    return cast("Tensor", _GatedSum.apply(tokens, gate, update))


def _pairs(heads: Tensor) -> Tensor:
    return torch.view_as_complex(heads.unflatten(-1, (-1, 2)))


def _turn(heads: Tensor, weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """`RotaryRMSNorm` of (B, N, H, D) as (B H, N, D), and the inverse root mean squares."""
    wide = heads.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    inverse_rms = square.div_(heads.shape[-1]).add_(EPS).rsqrt_()
    wide.mul_(inverse_rms).mul_(weight)
    _pairs(wide).mul_(table)
    return _by_head(wide.to(heads.dtype)), inverse_rms


def _turn_back(
    grad: Tensor,
    heads: Tensor,
    weight: Tensor,
    table: Tensor,
    inverse_rms: Tensor,
    out: Tensor,
    grad_weight: Tensor,
) -> None:
    """Write the gradient of `heads` to `out` (B, N, H D); add that of `weight`, head by head."""
    wide = torch.empty(heads.shape)
    wide.copy_(grad.unflatten(0, (len(heads), -1)).transpose(1, 2))
    _pairs(wide).mul_(table.conj())
    normed = heads.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    normed.mul_(inverse_rms)
    product = wide * normed
    # Sums as products with ones: many times faster than `sum` over these dimensions.
    grad_weight.view(-1).addmv_(product.flatten(1).T, product.new_ones(len(product)))
    # The norm lets no gradient through along its own direction.
    mean = product.new_full((heads.shape[-1],), -1 / heads.shape[-1])
    along = (product.mul_(weight) @ mean)[..., None]
    out.copy_(wide.mul_(weight).addcmul_(normed, along).mul_(inverse_rms).flatten(-2))


def _by_head(heads: Tensor) -> Tensor:
    """(B, N, H, D) → (B H, N, D)."""
    return heads.transpose(1, 2).flatten(0, 1)


def _by_token(heads: Tensor, out: Tensor) -> None:
    """Write (B H, N, D) to `out`, (B, N, H D)."""
    by_sample = heads.unflatten(0, (len(out), -1)).transpose(1, 2)
    out.unflatten(-1, by_sample.shape[2:]).copy_(by_sample)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key_value: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        table: Tensor,
        query_table: Tensor,
        column_bias: Tensor | None,
    ) -> Tensor:
        heads = (-1, key_weight.shape[-1])
        out = torch.empty_like(query)
        saved: list[Tensor] = []
        parts = list(chunks(len(query), key_value[0].numel()))
        for part in parts:
            asking, query_rms = _turn(query[part].unflatten(-1, heads), query_weight, query_table)
            key, value = key_value[part].unflatten(-1, heads).chunk(2, 2)
            key, key_rms = _turn(key, key_weight, table)
            scores = torch.bmm(asking, key.transpose(1, 2))
            if column_bias is not None:
                own = column_bias[part]
                view = scores.unflatten(0, (len(own), -1))[..., : own.shape[-1]]
                view += own[:, None, None]
            shares = scores.softmax(-1)
            _by_token(torch.bmm(shares, _by_head(value)), out[part])
            saved += [asking, query_rms, key, key_rms, shares]
        ctx.parts = parts
        tables = (query_weight, key_weight, table, query_table)
        ctx.save_for_backward(query, key_value, *tables, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        query_in, key_value, query_weight, key_weight, table, query_table, *saved = (
            ctx.saved_tensors
        )
        heads = (query_in.shape[-1] // key_weight.shape[-1], key_weight.shape[-1])
        grad_query, grad_key_value = torch.empty_like(query_in), torch.empty_like(key_value)
        grad_query_weight = torch.zeros(query_in.shape[1], *heads)
        grad_key_weight = torch.zeros(key_value.shape[1], *heads)
        for number, part in enumerate(ctx.parts):
            query, query_rms, key, key_rms, shares = saved[5 * number : 5 * number + 5]
            key_in, value = key_value[part].unflatten(-1, (-1, heads[1])).chunk(2, 2)
            grad_key, grad_value = grad_key_value[part].chunk(2, -1)

            attended = _by_head(grad[part].unflatten(-1, heads))
            _by_token(torch.bmm(shares.transpose(1, 2), attended), grad_value)
            grad_shares = torch.bmm(attended, _by_head(value).transpose(1, 2))
            scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            _turn_back(
                torch.bmm(scores, key), query_in[part].unflatten(-1, heads),
                query_weight, query_table, query_rms, grad_query[part], grad_query_weight,
            )  # fmt: skip
            _turn_back(
                torch.bmm(scores.transpose(1, 2), query), key_in,
                key_weight, table, key_rms, grad_key, grad_key_weight,
            )  # fmt: skip
        weights = (part.sum(1, keepdim=True) for part in (grad_query_weight, grad_key_weight))
        return grad_query, grad_key_value, *weights, None, None, None


def attend(
    query: Float[Tensor, "batch queries dim"],
    key_value: Float[Tensor, "batch tokens twice_dim"],
    query_weight: Float[Tensor, "queries 1 head_dim"],
    key_weight: Float[Tensor, "tokens 1 head_dim"],
    table: Complex64[Tensor, "tokens 1 pairs"],
    query_table: Complex64[Tensor, "queries 1 pairs"],
    column_bias: Float[Tensor, "batch columns"] | None = None,
) -> Float[Tensor, "batch queries dim"]:
    """Joint attention with normalised and turned queries and keys.

    Args:
        query: Queries of all heads.
        key_value: Keys of all heads, then values.
        query_weight: Norm of the queries, token by token, times the scale of the scores.
        key_weight: Norm of the keys.
        table: `rotary_table` of the tokens, and with
        query_table: that of those which ask.
        column_bias: Added to the scores of the first tokens.
    """
    tables = (query_weight, key_weight, table, query_table)
    return cast("Tensor", _Attend.apply(query, key_value, *tables, column_bias))
