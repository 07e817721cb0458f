"""Networks from their files: each tensor read once, stored as asked, or left in the file.

Nothing is ever in memory in a wider form than it stays in, but for one tensor at a time. Called by
`apply`.
"""

from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from step1x_edit.checkpoints.contents import one_line, read_config
from step1x_edit.checkpoints.folder import describe_misfit
from step1x_edit.checkpoints.tensor_files import TensorFiles
from step1x_edit.errors import CheckpointError
from step1x_edit.model.official_sizes import transformer_sizes
from step1x_edit.model.transformer import Step1XEditTransformer2DModel
from step1x_edit.runtime.disk import (
    BlockStream,
    RowsOnDisk,
    StreamTimes,
    Weights,
    empty_parameter,
    recognise_by,
)
from step1x_edit.runtime.precision import (
    FILE_DTYPES,
    SCALE,
    Precision,
    Stored,
    StoredLinear,
    bits_shape,
    block_linears,
    blocks,
    empty_stored,
    replace_module,
    scale_shape,
    store,
    widen,
)

TEXT_ENCODER_NAMES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)
"""Published files follow the names of transformers 4; its version 5 has one level more."""


class NetworkLoader:
    """Fills one network from its files.

    Args:
        model: Every parameter on the meta device; buffers are real.
        files: Its tensors, under the model's names. Weights in few bits have a ``weight_scale``
            beside them, or none if they are to be taken as they are.
        precision: How to store the linear layers of the blocks; None: as the files do.
        dtype: Compute precision, and that of everything else.
        device: Where to.
        widened: Make numbers of what the files have in few bits.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape.
    """

    def __init__(
        self,
        model: Any,
        files: TensorFiles,
        precision: Precision | None,
        dtype: torch.dtype,
        device: torch.device,
        *,
        widened: bool = False,
    ) -> None:
        self.model, self.files, self.dtype, self.device = model, files, dtype, device
        self._check()
        for name, linear in list(block_linears(model)):
            kept = precision or (None if widened else self._file_precision(name))
            if kept is not None:
                replace_module(model, name, empty_stored(linear, kept, dtype))
        self._names = {module: name for name, module in model.named_modules()}

    def load(self) -> None:
        """Read everything into memory."""
        self._fill(self.model)
        self._finish()

    def stream(self, reader: Executor, times: StreamTimes) -> list[BlockStream]:
        """Read what is outside the blocks, and leave the blocks in the files.

        Args:
            reader: The thread that reads.
            times: Gets the time that it took.
        """
        streamed = [block for _, block in blocks(self.model)]
        rows = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding)
        ]
        for name, module in rows:
            self._leave_rows(name, module)
        head = getattr(self.model, "lm_head", None)  # not used by an edit
        heads = [] if head is None else [head]
        for module in (*streamed, *heads):
            for leaf in module.modules():
                for key, parameter in leaf.named_parameters(recurse=False):
                    dtype = self.dtype if parameter.is_floating_point() else parameter.dtype
                    empty = empty_parameter(parameter.shape, dtype, self.device)
                    setattr(leaf, key, empty)
        self._fill(self.model)
        self._finish()
        recognise_by(self.model, self.files.fingerprint)
        rows_of_blocks = [row for row in (streamed, heads) if row]
        return [BlockStream(row, self._read_all, reader, times) for row in rows_of_blocks]

    def _leave_rows(self, name: str, module: nn.Embedding) -> None:
        key = f"{name}.weight"
        weight = empty_parameter(module.weight.shape, self.dtype, self.device)

        def read_row(row: int) -> Tensor:
            return self.files.read(key, slice(row, row + 1))[0].to(self.dtype)

        made = RowsOnDisk(module, read_row, weight)
        replace_module(self.model, name, made)
        self._names[made] = name

    def _fill(self, root: nn.Module) -> None:
        """Give every parameter that is still on the meta device its weights."""
        for module in root.modules():
            own = dict(module.named_parameters(recurse=False))
            if not any(parameter.is_meta for parameter in own.values()):
                continue
            for key, weight in self._read(module).items():
                setattr(module, key, nn.Parameter(weight, requires_grad=False))

    def _finish(self) -> None:
        """Tie what is shared, and move the buffers."""
        if hasattr(self.model, "tie_weights"):
            self.model.tie_weights()
        for module in self.model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, buffer.to(self.device))
        left = [name for name, tensor in self.model.named_parameters() if tensor.is_meta]
        assert not left, left
        self.model.eval()

    def _read_all(self, block: nn.Module) -> Weights:
        """The weights of a block by parameter."""
        return {
            getattr(module, key): weight
            for module in block.modules()
            if module in self._names
            for key, weight in self._read(module).items()
        }

    def _read(self, module: nn.Module) -> dict[str, Tensor]:
        """The weights of one module's own parameters, as it holds them."""
        name = self._names[module]
        if isinstance(module, StoredLinear):
            bits, scale = self._read_stored(name, module)
            weights = {"weight": bits, SCALE: scale.to(self.dtype)}
            if module.bias is not None:
                weights["bias"] = self.files.read(f"{name}.bias").to(self.dtype)
        else:
            weights = {
                key: self._read_dense(f"{name}.{key}" if name else key)
                for key, _ in module.named_parameters(recurse=False)
            }
        return {key: weight.to(self.device) for key, weight in weights.items()}

    def _read_stored(self, name: str, linear: StoredLinear) -> Stored:
        key = f"{name}.weight"
        if self._file_precision(name) == linear.precision:
            bits = self.files.read(key)
            return Stored(bits.view(linear.weight.dtype), self._read_scale(key, len(bits)))
        has_numbers = self._file_precision(name) is None
        dense = self.files.read(key) if has_numbers else self._read_dense(key, torch.float32)
        return store(dense, linear.precision)

    def _read_dense(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor as numbers, whatever the file has."""
        tensor = self.files.read(key)
        dtype = dtype or self.dtype
        precision = FILE_DTYPES.get(tensor.dtype)
        if precision is None:
            return tensor.to(dtype)
        if precision == "fp8" and f"{key}_scale" not in self.files.places:
            return tensor.to(dtype)
        bits = tensor.view(torch.uint8) if precision == "fp8" else tensor
        stored = Stored(bits, self._read_scale(key, len(bits)))
        return widen(stored, precision, dtype, self._in_features[key])

    def _read_scale(self, key: str, num_rows: int) -> Tensor:
        if f"{key}_scale" in self.files.places:
            return self.files.read(f"{key}_scale").float()
        return torch.ones(num_rows, 1)

    def _file_precision(self, name: str) -> Precision | None:
        return FILE_DTYPES.get(self.files.places[f"{name}.weight"].dtype)

    def _check(self) -> None:
        """Refuse files that do not fit the model."""
        wanted = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        self._in_features = {name: shape[-1] for name, shape in wanted.items() if shape}
        tied = getattr(self.model, "all_tied_weights_keys", {}) or {}
        for target, source in tied.items():  # such files may have it once or twice
            if source in self.files.places and target not in self.files.places:
                self.files.places[target] = self.files.places[source]
        found = {name: self._dense_shape(name, wanted) for name in self.files.places}
        for name, shape in list(wanted.items()):
            precision = FILE_DTYPES.get(self.files.places[name].dtype) if name in found else None
            # fp8 alone may come without: numbers that were cast as they are.
            is_matrix = len(shape) == 2
            if is_matrix and precision and (precision != "fp8" or f"{name}_scale" in found):
                wanted[f"{name}_scale"] = scale_shape(shape, precision)
        problem = describe_misfit(
            missing=[name for name in wanted if name not in found],
            unexpected=[name for name in found if name not in wanted and name not in tied],
            mismatched=[
                (name, found[name], shape)
                for name, shape in wanted.items()
                if found.get(name, shape) != shape
            ],
        )
        if problem:
            raise CheckpointError(f"{self.files.origin}: {problem}")

    def _dense_shape(self, name: str, wanted: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of a file's tensor as numbers; int4 is packed."""
        place = self.files.places[name]
        if name not in wanted or FILE_DTYPES.get(place.dtype) != "int4":
            return place.shape
        fits = place.shape == bits_shape(wanted[name], "int4")
        return wanted[name] if fits else place.shape


def open_transformer(place: Path) -> tuple[Step1XEditTransformer2DModel, TensorFiles]:
    """The transformer of a model without its weights, and the files that hold them.

    Args:
        place: The transformer's folder, or an official file.

    Raises:
        CheckpointError: The configuration or the files cannot be read or are impossible.
    """
    if not place.is_file():
        return empty_transformer(place), TensorFiles.of_folder(place)
    sizes = transformer_sizes(place, {})
    try:
        with torch.device("meta"):
            model = Step1XEditTransformer2DModel(**sizes)
    except ValueError as error:
        raise CheckpointError(f"{place}: {error}") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return model, TensorFiles.of_official(place, shapes)


def open_text_encoder(folder: Path) -> tuple[Any, TensorFiles]:
    """As `open_transformer`, of the language model's folder."""
    return empty_text_encoder(folder), TensorFiles.of_folder(folder, TEXT_ENCODER_NAMES)


def empty_transformer(folder: Path) -> Step1XEditTransformer2DModel:
    """The transformer of a model folder without its weights.

    Raises:
        CheckpointError: Its configuration cannot be read or is impossible.
    """
    read_config(folder)
    try:
        config: Any = Step1XEditTransformer2DModel.load_config(folder, local_files_only=True)
        with torch.device("meta"):
            made: Any = Step1XEditTransformer2DModel.from_config(config)
        return made
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: {one_line(error)}") from error


def empty_text_encoder(folder: Path) -> Any:
    """The text encoder of a model folder without its weights, its rotary tables filled.

    Raises:
        CheckpointError: Its configuration cannot be read or is impossible.
    """
    from transformers import Qwen2_5_VLConfig

    read_config(folder)
    try:
        config: Any = Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)
        return text_encoder_of(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: {one_line(error)}") from error


def text_encoder_of(config: Any) -> Any:
    """As `empty_text_encoder`, of a `Qwen2_5_VLConfig`."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            replace_module(model, name, type(module)(module.config))  # tables, made from the config
    return model
