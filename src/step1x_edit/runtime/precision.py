"""Weights stored in fewer bits than they are computed with.

`StoredLinear` is a linear layer that holds its weight in one of three codecs and widens it when it
runs; arithmetic, biases, norms, embeddings and everything outside the blocks keep the compute
precision. Stored weights are integers to torch, whatever they mean, so that `Module.to(dtype)`,
adapters and dtype look-ups, which only concern themselves with floating-point tensors, leave them
alone. Called by `load`, which stores while it reads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Precision = Literal["fp8", "int8", "int4"]
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
INT4_GROUP = 32
"""Neighbouring weights of a row that share a scale in int4."""
STORED_AT_ONCE = 2**21
"""Numbers of a weight that are float32 at a time: of a large one, several copies would be."""
SCALE = "weight_scale"
_MODULATIONS = ("norm", "adaLN_modulation")


class Stored(NamedTuple):
    """A weight in few bits.

    `bits` is (out, in) in fp8 and int8, (out, half of in, rounded up to whole groups) in int4;
    `scale` (out, 1), or (out, groups) in int4, of values that bfloat16 holds exactly.
    """

    bits: Tensor
    scale: Tensor


def _store_fp8(weight: Tensor) -> Stored:
    """e4m3 under a power of two for each row, which costs no digit and leaves no subnormals."""
    largest = weight.abs().amax(dim=1, keepdim=True)
    scale = torch.exp2(torch.log2(largest / FP8_MAX).ceil())
    scale = torch.where(largest > 0, scale, 1.0)
    return Stored((weight / scale).to(FP8).view(torch.uint8), scale)


def _widen_fp8(stored: Stored, dtype: torch.dtype) -> Tensor:
    return stored.bits.view(FP8).to(dtype).mul_(stored.scale.to(dtype))


def _store_int8(weight: Tensor) -> Stored:
    """Whole numbers of a 127th of each row's largest value."""
    scale = _representable(weight.abs().amax(dim=1, keepdim=True) / 127)
    return Stored((weight / scale).round().clamp(-127, 127).to(torch.int8), scale)


def _widen_int8(stored: Stored, dtype: torch.dtype) -> Tensor:
    return stored.bits.to(dtype).mul_(stored.scale.to(dtype))


def _store_int4(weight: Tensor) -> Stored:
    """-8 to 7 eighths of the largest of each 32 neighbours, by its sign, two to a byte.

    The largest value itself is -8, so that all sixteen levels are used; the rule of llama.cpp's
    Q4_0.
    """
    padding = -weight.shape[1] % INT4_GROUP
    groups = functional.pad(weight, (0, padding)).unflatten(1, (-1, INT4_GROUP))  # (O, G, 32)
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scale = _representable(largest / -8)
    levels = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.uint8).flatten(1)
    return Stored(levels[:, ::2] | levels[:, 1::2] << 4, scale.squeeze(2))


def _widen_int4(stored: Stored, dtype: torch.dtype) -> Tensor:
    """May be wider than the weight was, by what filled up the last group."""
    levels = torch.stack([stored.bits & 15, stored.bits >> 4], dim=-1).flatten(1)
    groups = (levels.to(dtype) - 8).unflatten(1, (-1, INT4_GROUP))
    return groups.mul_(stored.scale.to(dtype).unsqueeze(2)).flatten(1)


def _representable(scale: Tensor) -> Tensor:
    """The nearest scale that bfloat16 holds; 1 for a row of zeros."""
    return torch.where(scale != 0, scale.bfloat16().float(), 1.0)


_STORE: dict[Precision, Callable[[Tensor], Stored]] = {
    "fp8": _store_fp8,
    "int8": _store_int8,
    "int4": _store_int4,
}
_WIDEN: dict[Precision, Callable[[Stored, torch.dtype], Tensor]] = {
    "fp8": _widen_fp8,
    "int8": _widen_int8,
    "int4": _widen_int4,
}
FILE_DTYPES: dict[torch.dtype, Precision] = {
    FP8: "fp8",
    torch.int8: "int8",
    torch.uint8: "int4",
}
"""Dtype of a weight in a file → how it is stored."""


def store(weight: Tensor, precision: Precision) -> Stored:
    """Store a weight (out, in) of any floating type in few bits, some rows at a time."""
    rows = weight.split(max(1, STORED_AT_ONCE // weight.shape[1]))
    parts = [_STORE[precision](some.float()) for some in rows]
    return Stored(*(torch.cat(each) for each in zip(*parts, strict=True)))


def bits_shape(shape: Sequence[int], precision: Precision) -> tuple[int, ...]:
    """Shape of the bits of a weight of `shape` (out, in)."""
    if precision != "int4":
        return tuple(shape)
    groups = -(-shape[1] // INT4_GROUP)
    return shape[0], groups * INT4_GROUP // 2


def scale_shape(shape: Sequence[int], precision: Precision) -> tuple[int, int]:
    """Shape of the scale of a weight of `shape` (out, in)."""
    return shape[0], -(-shape[1] // INT4_GROUP) if precision == "int4" else 1


def widen(stored: Stored, precision: Precision, dtype: torch.dtype, in_features: int) -> Tensor:
    """A stored weight as numbers of `dtype`, (out, in_features)."""
    return _WIDEN[precision](stored, dtype)[:, :in_features]


class StoredLinear(nn.Linear):
    """A linear layer whose weight is stored in few bits and widened for each call.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether there is one; it keeps the compute precision.
        precision: How the weight is stored.
        dtype: Compute precision.
        device: Where the (empty) parameters are made.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        precision: Precision,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.precision: Precision = precision
        bits = torch.empty(
            bits_shape((out_features, in_features), precision),
            dtype=torch.int8 if precision == "int8" else torch.uint8,
            device=device,
        )
        shape = scale_shape((out_features, in_features), precision)
        scale = torch.empty(shape, dtype=dtype, device=device)
        self.weight = nn.Parameter(bits, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        if bias:
            empty = torch.empty(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers, (out, in)."""
        return widen(
            Stored(self.weight, self.weight_scale), self.precision, dtype, self.in_features
        )

    @contextmanager
    def as_numbers(self) -> Iterator[None]:
        """Hold the weight as float32 numbers, (out, in), and store again what it has become."""
        bits = self.weight.data
        self.weight.data = self.widened(torch.float32)
        try:
            yield
            stored = store(self.weight.data, self.precision)
        finally:
            self.weight.data = bits
        bits.copy_(stored.bits)
        self.weight_scale.data.copy_(stored.scale)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """As of `nn.Linear`, in the precision of `input`."""
        return functional.linear(input, self.widened(input.dtype), self.bias)

    def extra_repr(self) -> str:
        """Sizes and precision, for printing."""
        return f"{super().extra_repr()}, precision={self.precision}"


def block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that may be stored in few bits, with their names.

    Those of the blocks, without their modulations: shift, scale and gate act on every token alike,
    so that their errors do not average out.
    """
    for block_name, block in blocks(model):
        for name, module in block.named_modules(prefix=block_name):
            is_modulation = any(
                part.startswith(_MODULATIONS) for part in name[len(block_name) :].split(".")
            )
            if isinstance(module, nn.Linear) and not is_modulation:
                yield name, module


def blocks(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The repeated blocks of a model in the order in which they are defined, which is that of use.

    Args:
        model: A transformer of ours or a model of transformers; it names its blocks' classes in
            ``_no_split_modules``.
    """
    classes = set(model._no_split_modules)
    for name, module in model.named_modules():
        if type(module).__name__ in classes:
            yield name, module


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module under a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def empty_stored(linear: nn.Linear, precision: Precision, dtype: torch.dtype) -> StoredLinear:
    """A stored layer of another's sizes, its parameters on the meta device."""
    has_bias = linear.bias is not None
    return StoredLinear(linear.in_features, linear.out_features, has_bias, precision, dtype, "meta")
