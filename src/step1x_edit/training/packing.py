"""Rows of different lengths one behind the other, with no padding between them.

Layers that work token by token then work on real tokens alone; what looks at a whole row works on
a group of rows of one length at a time. Rows that are sorted by length waste least. Called by
`quick_blocks` and `quick_ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Packing:
    """Where the rows of a batch lie in a tensor of (all tokens, dim).

    Attributes:
        rows: The rows of each group, one group after the other.
        text: Text tokens that each row of a group begins with.
        num_image: Picture tokens of every row, behind its text.
    """

    rows: tuple[slice, ...]
    text: tuple[int, ...]
    num_image: int

    def only_text(self) -> Packing:
        """The same rows without their picture tokens."""
        return Packing(self.rows, self.text, 0)

    def only_image(self, num_image: int | None = None) -> Packing:
        """The same rows without their text, and with their first `num_image` picture tokens."""
        own = self.num_image if num_image is None else num_image
        return Packing(self.rows, (0,) * len(self.rows), own)

    def shapes(self) -> list[tuple[int, int]]:
        """Rows of each group, and tokens of a row."""
        return [
            (rows.stop - rows.start, text + self.num_image)
            for rows, text in zip(self.rows, self.text, strict=True)
        ]

    @property
    def num_tokens(self) -> int:
        """Of all rows together."""
        return sum(rows * length for rows, length in self.shapes())

    def cut(self, packed: Float[Tensor, "tokens dim"]) -> list[Float[Tensor, "_ _ dim"]]:
        """Views of the groups."""
        shapes = self.shapes()
        groups = packed.split([rows * length for rows, length in shapes])
        dim = packed.shape[-1]
        return [group.view(*shape, dim) for group, shape in zip(groups, shapes, strict=True)]

    def pack(self, padded: Float[Tensor, "batch longest dim"]) -> Float[Tensor, "tokens dim"]:
        """The first tokens of padded rows, as many as this packing has."""
        lengths = [length for _, length in self.shapes()]
        if len(set(lengths)) == 1:  # the gradient of one slice costs less than that of many
            return padded[:, : lengths[0]].flatten(0, 1)
        groups = zip(self.rows, lengths, strict=True)
        return torch.cat([padded[rows, :length].flatten(0, 1) for rows, length in groups])


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, text: Tensor, image: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return _joined(text, image, packing)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's own way to write it
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        return *_divided(grad_outputs[0], ctx.packing), None


class _Divide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        ctx.packing = packing
        return _divided(tokens, packing)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        text, image = grad_outputs
        return _joined(text, image, ctx.packing), None


def _joined(text: Tensor, image: Tensor, packing: Packing) -> Tensor:
    out = text.new_empty(len(text) + len(image), text.shape[-1])
    texts = packing.only_text().cut(text)
    images = packing.only_image().cut(image.contiguous())
    for group, *parts in zip(packing.cut(out), texts, images, strict=True):
        torch.cat(parts, 1, out=group)
    return out


def _divided(tokens: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    parts = (packing.only_text(), packing.only_image())
    text, image = (tokens.new_empty(part.num_tokens, tokens.shape[-1]) for part in parts)
    groups = packing.cut(tokens.contiguous())
    for group, *own in zip(groups, parts[0].cut(text), parts[1].cut(image), strict=True):
        for whole, out in zip(group.split([part.shape[1] for part in own], 1), own, strict=True):
            out.copy_(whole)
    return text, image


def join(
    text: Float[Tensor, "texts dim"], image: Float[Tensor, "images dim"], packing: Packing
) -> Float[Tensor, "tokens dim"]:
    """Text and picture tokens of the rows, packed apart, as `packing` has them together."""
    return cast("Tensor", _Join.apply(text, image, packing))


def divide(
    tokens: Float[Tensor, "tokens dim"], packing: Packing
) -> tuple[Float[Tensor, "texts dim"], Float[Tensor, "images dim"]]:
    """The other way round: text tokens and picture tokens, packed apart."""
    return cast("tuple[Tensor, Tensor]", _Divide.apply(tokens, packing))
