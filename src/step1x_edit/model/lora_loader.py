"""The pipeline's LoRA loader, in diffusers' conventions: load, weigh, switch, fuse, unload.

PEFT puts a LoRA beside each linear layer; the layer itself is not touched, whatever dtype its
weight is stored in, and gets its place back when the LoRA goes. Only fusing changes weights, and
their originals are kept, because adding and subtracting again would round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor, nn

from step1x_edit.errors import CheckpointError, InvalidRequest
from step1x_edit.model.lora_layouts import check_fit
from step1x_edit.model.lora_tensors import change_layout, peft_config, read_lora

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@runtime_checkable
class StoresBits(Protocol):
    """A linear layer whose weight is stored as something else than numbers."""

    def as_numbers(self) -> AbstractContextManager[None]:
        """While entered, ``weight`` is numbers (out, in); left, it is stored as before."""
        ...


class Step1XEditLoraLoaderMixin(LoraBaseMixin):
    """LoRAs of the transformer; several at once, each with a weight."""

    _lora_loadable_modules: ClassVar[list[str]] = ["transformer"]
    transformer_name = "transformer"
    transformer: Any

    _originals: dict[Any, tuple[dict[str, Tensor], dict[str, float]]] | None = None
    """While fused: LoRA layer → what its base layer's parameters were, and the adapters' scales."""

    def load_lora_weights(  # pyright: ignore[reportIncompatibleMethodOverride] - arguments named
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        weight_name: str | None = None,
    ) -> None:
        """Put a LoRA on the transformer, beside those that are there; it alone is active then.

        Args:
            pretrained_model_name_or_path_or_dict: A safetensors file in the kohya, PEFT or ComfyUI
                layout, its tensors, a folder, or a hub repository.
            adapter_name: Name for `set_adapters`; by default ``default_0`` and so on.
            weight_name: File in the folder or repository; may be left out where a folder has one.

        Raises:
            CheckpointError: Not a whole LoRA file, or one of another model; nothing is changed.
            InvalidRequest: A name is taken or missing.
        """
        transformer = self.transformer
        if adapter_name in getattr(transformer, "peft_config", {}):
            raise InvalidRequest(f"adapter name {adapter_name!r} is taken; give another")
        source = _source(pretrained_model_name_or_path_or_dict, weight_name)
        header, lora = read_lora(source)
        check_fit(header, layer_sizes(transformer))
        lora = change_layout(lora, "peft")
        # Weights stored in eight bits or less are computed with in bfloat16.
        dtype = transformer.dtype if transformer.dtype in COMPUTE_DTYPES else torch.bfloat16
        tensors = {}
        for name, update in lora.layers.items():
            tensors[f"{name}.lora_A.weight"] = update.down.to(dtype)
            tensors[f"{name}.lora_B.weight"] = update.up.to(dtype)
        self._restore_weights()
        trainable = {
            name.replace(".base_layer.", "."): parameter.requires_grad
            for name, parameter in transformer.named_parameters()
        }
        transformer.load_lora_adapter(
            tensors,
            prefix=None,
            adapter_name=adapter_name,
            metadata=peft_config(lora),
            low_cpu_mem_usage=True,
            _pipeline=self,
        )
        for name, parameter in transformer.named_parameters():
            # PEFT freezes the base and makes the LoRA trainable; this loader only runs it.
            parameter.requires_grad_(trainable.get(name.replace(".base_layer.", "."), False))

    def set_adapters(  # pyright: ignore[reportIncompatibleMethodOverride] - one component, so no dict
        self, adapter_names: list[str] | str, adapter_weights: float | list[float] | None = None
    ) -> None:
        """Choose the active LoRAs and their weights; fused ones are unfused first.

        Args:
            adapter_names: Of the loaded ones.
            adapter_weights: One for all or one each, 1 by default.
        """
        self._restore_weights()
        super().set_adapters(adapter_names, adapter_weights)

    def disable_lora(self) -> None:
        """Run without LoRAs until `enable_lora`."""
        self._restore_weights()
        super().disable_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove LoRAs by name."""
        self._restore_weights()
        super().delete_adapters(adapter_names)

    def unload_lora_weights(self) -> None:
        """Remove every LoRA; the transformer is bit for bit what it was before."""
        self._restore_weights()
        super().unload_lora_weights()

    def fuse_lora(  # pyright: ignore[reportIncompatibleMethodOverride] - without deprecated arguments
        self,
        components: Sequence[str] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Add the active LoRAs into the weights, which saves their share of every step.

        The original weights are kept in main memory until `unfuse_lora`. Those that are stored in
        few bits are widened, added to, and stored again, which rounds the sum as it rounded them.

        Args:
            components: The transformer, which is all there is.
            lora_scale: On top of the adapters' own weights.
            safe_fusing: Refuse a sum that is not finite.
            adapter_names: Instead of the active ones.

        Raises:
            InvalidRequest: The weights are stored in a form that cannot be added to, or wait in
                their files.
        """
        _check_components(components)
        layers = {
            name: layer
            for name, layer in _lora_layers(self.transformer).items()
            if set(adapter_names or layer.active_adapters)
            & ({*layer.lora_A} - {*layer.merged_adapters})
        }
        for name, layer in layers.items():
            _check_fusible(name, layer.get_base_layer())
        self._originals = self._originals or {}
        for layer in layers.values():
            base = layer.get_base_layer()
            if layer not in self._originals:
                kept = {
                    key: parameter.detach().to("cpu", copy=True)
                    for key, parameter in base.named_parameters(recurse=False)
                }
                self._originals[layer] = kept, dict(layer.scaling)
            if lora_scale != 1:
                layer.scale_layer(lora_scale)
            with base.as_numbers() if isinstance(base, StoresBits) else nullcontext():
                layer.merge(safe_fusing, adapter_names)
            self._merged_adapters = self._merged_adapters | {*layer.merged_adapters}

    def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - without deprecated arguments
        """Undo `fuse_lora`: the weights get their old bits, the LoRAs act beside them again."""
        _check_components(components)
        self._restore_weights()

    def _restore_weights(self) -> None:
        for layer, (parameters, scaling) in (self._originals or {}).items():
            for key, original in parameters.items():
                layer.get_base_layer().get_parameter(key).data.copy_(original)
            layer.merged_adapters.clear()
            layer.scaling.update(scaling)
        self._originals = None
        self._merged_adapters = set()


def layer_sizes(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """Layer name → rows and columns of each linear layer, whatever wraps or stores it."""
    adapters = {"base_layer", "lora_A", "lora_B"}
    modules: dict[str, Any] = dict(transformer.named_modules())
    return {
        name: (module.out_features, module.in_features)
        for name, module in modules.items()
        if hasattr(module, "in_features") and not adapters & {*name.split(".")}
    }


def _check_components(components: Sequence[str]) -> None:
    if [*components] != Step1XEditLoraLoaderMixin._lora_loadable_modules:
        raise InvalidRequest(f"components {[*components]}: there is only the transformer")


def _check_fusible(name: str, base: Any) -> None:
    """Refuse a layer whose weight cannot be changed where it is."""
    weight = base.weight
    if weight.untyped_storage().nbytes() < weight.numel() * weight.element_size():
        raise InvalidRequest(
            f"a LoRA cannot be fused into {name}, whose weight waits elsewhere until it is needed "
            "(offload): leave it beside the weights, or load without offload"
        )
    is_plain = weight.dtype in COMPUTE_DTYPES and type(weight.data) is Tensor
    if not is_plain and not isinstance(base, StoresBits):
        raise InvalidRequest(
            f"a LoRA cannot be fused into {name}, whose weight is stored as "
            f"{type(weight.data).__name__} of {weight.dtype}; leave it beside the weights"
        )


def _lora_layers(transformer: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {n: module for n, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def _source(
    given: str | Path | Mapping[str, Tensor], weight_name: str | None
) -> Path | Mapping[str, Tensor]:
    """The file or the tensors that were meant."""
    if isinstance(given, Mapping):
        return given
    path = Path(given)
    if path.is_dir():
        files = [path / weight_name] if weight_name else sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise InvalidRequest(
                f"{path} holds {len(files)} safetensors files; name one with weight_name="
            )
        return files[0]
    if weight_name is None or path.exists():
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(given), weight_name))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        what = " ".join(str(error).split())
        raise CheckpointError(f"{given}/{weight_name} cannot be fetched: {what}") from error
