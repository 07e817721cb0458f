"""Parts of a transformer block as single steps of autograd, for training on a CPU in bfloat16.

The plain form writes every intermediate value of a whole batch to memory and reads it again; a few
samples' worth of them fits a core's cache. What happens between two matrix products over all
tokens is done here a group of rows at a time, forwards and backwards, and written once, in the
layout that the next product reads. Tokens of all rows lie one behind the other (`packing`). Values
and gradients are the plain form's to bfloat16 rounding. Called by `quick_blocks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Complex64, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from step1x_edit.model.attention import EPS
from step1x_edit.training.packing import Packing

HAS_MATRIX_UNIT = torch.cpu._is_amx_tile_supported()
"""Whether the processor multiplies tiles of matrices (Intel's AMX)."""


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
        grad = grad_outputs[0]
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if ctx.needs_input_grad[0]:
            grads[0] = grad @ weight
        if any(ctx.needs_input_grad[1:]):
            grad_weight = _outer(grad, tokens)
            pairs = zip(grad_weight.split(ctx.sizes), grad.sum(0).split(ctx.sizes), strict=True)
            flat = (part for pair in pairs for part in pair)
            grads[1:] = [part.float() for part in flat]
        return tuple(grads)


def _outer(grad: Tensor, tokens: Tensor) -> Tensor:
    """``grad.T @ tokens``; a matrix unit is fed faster when the narrower factor is turned first."""
    if not HAS_MATRIX_UNIT:
        return grad.T @ tokens
    if grad.shape[1] >= tokens.shape[1]:
        return (tokens.T.contiguous() @ grad).T.contiguous()
    return grad.T.contiguous() @ tokens


def project(
    tokens: Float[Tensor, "tokens dim"], *layers: nn.Linear
) -> Float[Tensor, "tokens outs"]:
    """Outputs of linear layers over the same tokens, side by side: one product for all of them."""
    parameters = [part for layer in layers for part in (layer.weight, layer.bias)]
    return cast("Tensor", _Project.apply(tokens, *parameters))


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
        grad = grad_outputs[0]
        turned = grad.T.contiguous() if HAS_MATRIX_UNIT else grad.T
        grad_weight = torch.cat([turned @ part for part in (first, second)], 1)
        grad_first, grad_second = (grad @ weight for weight in weights)
        return grad_first, grad_second, grad_weight.float(), grad.sum(0).float()


def project_pair(
    first: Float[Tensor, "tokens one"], second: Float[Tensor, "tokens two"], layer: nn.Linear
) -> Float[Tensor, "tokens outs"]:
    """A linear layer over two inputs that its plain form would write side by side first."""
    return cast("Tensor", _ProjectPair.apply(first, second, layer.weight, layer.bias))


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, shift: Tensor, scale: Tensor, packing: Packing) -> Tensor:
        factor = 1 + scale
        out = torch.empty_like(tokens)
        statistics: list[Tensor] = []
        for rows, part, own in _zip(packing, tokens, out):
            normed, *moments = torch.native_layer_norm(part, part.shape[-1:], None, None, EPS)
            torch.addcmul(shift[rows], normed, factor[rows], out=own)
            statistics += moments
        ctx.packing = packing
        ctx.save_for_backward(tokens, factor, *statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        tokens, factor, *statistics = ctx.saved_tensors
        grad_tokens = torch.empty_like(tokens)
        grad_shift, grad_scale = torch.empty_like(factor), torch.empty_like(factor)
        groups = _zip(ctx.packing, tokens, grad_outputs[0].contiguous(), grad_tokens)
        for number, (rows, part, grad, out) in enumerate(groups):
            shape = part.shape[-1:]
            normed = torch.native_layer_norm(part, shape, None, None, EPS)[0]
            torch.sum(grad, 1, keepdim=True, out=grad_shift[rows])
            torch.sum(normed.mul_(grad), 1, keepdim=True, out=grad_scale[rows])
            mean, rstd = statistics[2 * number : 2 * number + 2]
            out.copy_(
                torch.ops.aten.native_layer_norm_backward(
                    grad * factor[rows], part, shape, mean, rstd, None, None, [True, False, False]
                )[0]
            )
        return grad_tokens, grad_shift, grad_scale, None


def _zip(packing: Packing, *packed: Tensor) -> Iterator[tuple[Any, ...]]:
    """Group by group: its rows, and its view of each tensor."""
    return zip(packing.rows, *map(packing.cut, packed), strict=True)


def modulated_norm(
    tokens: Float[Tensor, "tokens dim"],
    shift: Float[Tensor, "batch 1 dim"],
    scale: Float[Tensor, "batch 1 dim"],
    packing: Packing,
) -> Float[Tensor, "tokens dim"]:
    """Layer norm without weights, times ``1 + scale``, plus `shift`."""
    return cast("Tensor", _ModulatedNorm.apply(tokens, shift, scale, packing))


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gate: Tensor, update: Tensor, packing: Packing) -> Tensor:
        out = torch.empty_like(tokens)
        for rows, part, change, own in _zip(packing, tokens, update, out):
            torch.addcmul(part, gate[rows], change, out=own)
        ctx.packing = packing
        ctx.save_for_backward(gate, update)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        gate, update = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_update, grad_gate = torch.empty_like(update), torch.empty_like(gate)
        for rows, part, change, own in _zip(ctx.packing, grad, update, grad_update):
            torch.mul(part, gate[rows], out=own)
            torch.sum(part * change, 1, keepdim=True, out=grad_gate[rows])
        return grad, grad_gate, grad_update, None


def gated_sum(
    tokens: Float[Tensor, "tokens dim"],
    gate: Float[Tensor, "batch 1 dim"],
    update: Float[Tensor, "tokens dim"],
    packing: Packing,
) -> Float[Tensor, "tokens dim"]:
    """``tokens + gate * update``."""
    return cast("Tensor", _GatedSum.apply(tokens, gate, update, packing))


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
    grad: Tensor, heads: Tensor, weight: Tensor, table: Tensor, inverse_rms: Tensor, out: Tensor
) -> Tensor:
    """Write the gradient of `heads` to `out` (B, N, H D); return that of `weight` (N, H, D)."""
    wide = torch.empty(heads.shape)
    wide.copy_(grad.unflatten(0, (len(heads), -1)).transpose(1, 2))
    _pairs(wide).mul_(table.conj())
    normed = heads.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    normed.mul_(inverse_rms)
    product = wide * normed
    # Sums as products with ones: many times faster than `sum` over these dimensions.
    grad_weight = product.new_ones(len(product)) @ product.flatten(1)
    # The norm lets no gradient through along its own direction.
    mean = product.new_full((heads.shape[-1],), -1 / heads.shape[-1])
    along = (product.mul_(weight) @ mean)[..., None]
    out.copy_(wide.mul_(weight).addcmul_(normed, along).mul_(inverse_rms).flatten(-2))
    return grad_weight.view(heads.shape[1:])


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
        asking: Packing,
        packing: Packing,
        padding_bias: tuple[Tensor, ...],
    ) -> Tensor:
        heads = (-1, key_weight.shape[-1])
        out = torch.empty_like(query)
        saved: list[Tensor] = []
        groups = zip(
            asking.cut(query), packing.cut(key_value), asking.cut(out), padding_bias, strict=True
        )
        for number, (query_in, key_value_in, own, bias) in enumerate(groups):
            asked, query_rms = _turn(
                query_in.unflatten(-1, heads),
                *_token_tables(asking, number, query_weight, table, packing.num_image),
            )
            key, value = key_value_in.unflatten(-1, heads).chunk(2, 2)
            tables = _token_tables(packing, number, key_weight, table, packing.num_image)
            key, key_rms = _turn(key, *tables)
            scores = torch.bmm(asked, key.transpose(1, 2))
            by_row = scores.unflatten(0, (len(bias), -1))[..., : bias.shape[-1]]
            by_row += bias[:, None, None]
            shares = scores.softmax(-1)
            _by_token(torch.bmm(shares, _by_head(value)), own)
            saved += [asked, query_rms, key, key_rms, shares]
        ctx.packings = (asking, packing)
        ctx.save_for_backward(query, key_value, query_weight, key_weight, table, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key_value, query_weight, key_weight, table, *saved = ctx.saved_tensors
        asking, packing = ctx.packings
        heads = (-1, key_weight.shape[-1])
        grad_query, grad_key_value = torch.empty_like(query), torch.empty_like(key_value)
        grad_query_weight, grad_key_weight = map(torch.zeros_like, (query_weight, key_weight))
        groups = zip(
            asking.cut(grad_outputs[0].contiguous()),
            asking.cut(query), asking.cut(grad_query),
            packing.cut(key_value), packing.cut(grad_key_value),
            strict=True,
        )  # fmt: skip
        for number, (grad, query_in, query_out, key_value_in, key_value_out) in enumerate(groups):
            asked, query_rms, key, key_rms, shares = saved[5 * number : 5 * number + 5]
            key_in, value = key_value_in.unflatten(-1, heads).chunk(2, 2)
            key_out, value_out = key_value_out.chunk(2, -1)

            attended = _by_head(grad.unflatten(-1, heads))
            _by_token(torch.bmm(shares.transpose(1, 2), attended), value_out)
            grad_shares = torch.bmm(attended, _by_head(value).transpose(1, 2))
            scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            by_token = _turn_back(
                torch.bmm(scores, key), query_in.unflatten(-1, heads),
                *_token_tables(asking, number, query_weight, table, packing.num_image),
                query_rms, query_out,
            )  # fmt: skip
            _add_by_kind(grad_query_weight, by_token, asking.text[number])
            by_token = _turn_back(
                torch.bmm(scores.transpose(1, 2), asked), key_in,
                *_token_tables(packing, number, key_weight, table, packing.num_image),
                key_rms, key_out,
            )  # fmt: skip
            _add_by_kind(grad_key_weight, by_token, packing.text[number])
        return grad_query, grad_key_value, grad_query_weight, grad_key_weight, *[None] * 4


def _token_tables(
    packing: Packing, number: int, weight: Tensor, table: Tensor, num_image: int
) -> tuple[Tensor, Tensor]:
    """Norm weights and positions of a group's tokens, one by one.

    `table` has all text positions of the longest row before the `num_image` picture positions.
    """
    text, image, first = packing.text[number], packing.num_image, len(table) - num_image
    return (
        torch.cat([weight[0].expand(text, 1, -1), weight[1].expand(image, 1, -1)]),
        torch.cat([table[:text], table[first : first + image]]),
    )


def _add_by_kind(sums: Tensor, by_token: Tensor, num_text: int) -> None:
    """Add (N, H, D) up over text and over picture tokens: `sums` (2, D)."""
    counts = [num_text, len(by_token) - num_text]
    for total, part in zip(sums, by_token.flatten(1).split(counts), strict=True):
        total += part.sum(0).view(-1, len(total)).sum(0)


def attend(
    query: Float[Tensor, "queries dim"],
    key_value: Float[Tensor, "tokens twice_dim"],
    query_weight: Float[Tensor, "2 head_dim"],
    key_weight: Float[Tensor, "2 head_dim"],
    table: Complex64[Tensor, "positions 1 pairs"],
    asking: Packing,
    packing: Packing,
    padding_bias: tuple[Float[Tensor, "_ _"], ...],
) -> Float[Tensor, "queries dim"]:
    """Joint attention with normalised and turned queries and keys.

    Args:
        query: Queries of all heads.
        key_value: Keys of all heads, then values.
        query_weight: Norm of the queries, of text and of picture tokens, times the scale of the
            scores.
        key_weight: Norm of the keys.
        table: `rotary_table` of the longest row's text and of the picture.
        asking: Of the queries.
        packing: Of the keys and values.
        padding_bias: Added to the scores of each group's text tokens.
    """
    weights = (query_weight, key_weight)
    return cast(
        "Tensor", _Attend.apply(query, key_value, *weights, table, asking, packing, padding_bias)
    )
