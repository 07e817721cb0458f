"""A LoRA that is trained: put beside a transformer's layers, taken from there, written in files.

PEFT puts it there, whatever stores the layer's weight. The release adapts layers that hold query,
key and value as one; ours are apart, so they share one down matrix, which makes the two the same
LoRA. Called by `tuning`.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from step1x_edit.errors import InvalidRequest
from step1x_edit.model.lora_layouts import Layout, layer_of
from step1x_edit.model.lora_loader import layer_sizes
from step1x_edit.model.lora_tensors import Lora, LoraLayer, change_layout, write_lora
from step1x_edit.training import ranks
from step1x_edit.training.config import LoraRun

ADAPTER = "trained"


def put_on(transformer: Any, config: LoraRun) -> None:
    """Put an untrained LoRA beside a transformer's layers; it alone can be trained then.

    Down matrices are drawn as the released trainer does (He et al. 2015, a = √5), up matrices are
    zero, so that the model is the same as before. Both are float32 and compute in the model's
    precision, see `MasterLinear`.

    Args:
        transformer: Without adapters.
        config: Rank, alpha, layers and seed.

    Raises:
        InvalidRequest: No layer has such a name, or it is no regular expression.
    """
    from peft import LoraConfig

    groups = _groups(transformer, config.layers)
    names = [name for group in groups for name in group]
    _refuse_connector(names, config)
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - may be a fraction
            # An expression has to fit as a whole; of a list, "proj_out" is every block's, too.
            target_modules="|".join(map(re.escape, names)),
        ),
        adapter_name=ADAPTER,
    )
    draw = torch.Generator().manual_seed(config.seed)
    modules = dict(transformer.named_modules())
    for group in groups:
        layers = [modules[name] for name in group]
        down = torch.empty(layers[0].lora_A[ADAPTER].weight.shape)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=draw)
        shared = nn.Parameter(down.to(layers[0].lora_A[ADAPTER].weight.device))
        for layer in layers:
            up = layer.lora_B[ADAPTER].weight
            layer.lora_A[ADAPTER] = MasterLinear(shared)
            layer.lora_B[ADAPTER] = MasterLinear(nn.Parameter(up.detach().float()))
            layer.cast_input_dtype_enabled = False


class MasterLinear(nn.Linear):
    """A float32 matrix that computes in the precision of its input.

    Without autocast, which on a GPU would also compute the norms before it in float32, and PEFT's
    casts of the input, of which every adapted layer keeps one for its gradient: a third of what a
    block takes.

    Args:
        weight: (out, in).
    """

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """As of `nn.Linear`."""
        return functional.linear(input, self.weight.to(input.dtype))


def _groups(transformer: nn.Module, pattern: str) -> list[list[str]]:
    """Our layers of each official one whose name fits the pattern."""
    groups: dict[str, list[str]] = {}
    for name in layer_sizes(transformer):
        layer = layer_of(name, "peft")
        if layer is not None:
            groups.setdefault(layer.official, []).append(name)
    try:
        chosen = [names for official, names in groups.items() if re.fullmatch(pattern, official)]
    except re.error as error:
        raise InvalidRequest(f"layers {pattern!r} is no regular expression: {error}") from error
    if not chosen:
        raise InvalidRequest(
            f"layers {pattern!r} fits no layer: the names are as {', '.join([*groups][:3])}"
        )
    return chosen


def _refuse_connector(names: list[str], config: LoraRun) -> None:
    """Its blocks are not run again in the backward pass, when weights that wait would be gone."""
    outside = [name for name in names if name.startswith("connector.")]
    if config.offload != "none" and outside:
        raise InvalidRequest(
            f"layers {config.layers!r} fits {outside[0]}, which offload {config.offload} leaves "
            "without its weights when its gradient is computed: leave the connector out, or set "
            "offload to none"
        )


def matrix_sizes(transformer: nn.Module, config: LoraRun) -> list[int]:
    """Numbers of each matrix that `put_on` makes.

    Raises:
        InvalidRequest: As of `put_on`.
    """
    sizes = layer_sizes(transformer)
    downs, ups = [], []
    for names in _groups(transformer, config.layers):
        downs.append(config.rank * sizes[names[0]][1])
        ups += [config.rank * sizes[name][0] for name in names]
    return downs + ups


def taken_from(transformer: nn.Module, alpha: float, dtype: torch.dtype) -> Lora:
    """The LoRA as it is now, in our names; of several processes all call this together.

    Args:
        transformer: After `put_on`.
        alpha: Its alpha.
        dtype: What its matrices are rounded to.
    """
    layers = {}
    for name, module in transformer.named_modules():
        if ADAPTER in getattr(module, "lora_A", ()):
            parts: Any = module
            down, up = (
                ranks.whole(matrix[ADAPTER].weight.detach()).to("cpu", dtype, copy=True)
                for matrix in (parts.lora_A, parts.lora_B)
            )
            layers[name] = LoraLayer(down, up, torch.tensor(float(alpha)))
    return Lora("the trained LoRA", "peft", layers, {})


def write_files(
    lora: Lora, folder: Path, layouts: Sequence[Layout], metadata: Mapping[str, str]
) -> list[Path]:
    """Write ``lora_LAYOUT.safetensors`` for each layout, and give the paths back."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for layout in layouts:
        named = change_layout(lora, layout)
        path = folder / f"lora_{layout}.safetensors"
        write_lora(Lora(named.label, layout, named.layers, dict(metadata)), path)
        paths.append(path)
    return paths


def describe(
    config: LoraRun, version: str, lora: Lora, step: int, num_examples: int
) -> dict[str, str]:
    """What a file says of itself: `modelspec.*` (Stability AI's ModelSpec) and kohya's `ss_*`.

    Args:
        config: The run.
        version: Release of the model: "v1.0" or "v1.1".
        lora: The matrices, for their hash.
        step: Steps done.
        num_examples: In the data, each once.
    """
    digest = hashlib.sha256()
    for name, layer in sorted(lora.layers.items()):
        digest.update(name.encode())
        for matrix in (layer.down, layer.up):
            digest.update(matrix.contiguous().view(torch.uint8).numpy().tobytes())
    side, batch_size = config.data.heaviest
    said = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"step1x-edit-{version}/lora",
        "modelspec.implementation": "https://github.com/stepfun-ai/Step1X-Edit",
        "modelspec.title": config.folder.name,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.hash_sha256": f"0x{digest.hexdigest()}",
        "ss_base_model_version": f"step1x-edit-{version}",
        "ss_sd_model_name": config.model,
        "ss_output_name": config.folder.name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": config.rank,
        "ss_network_alpha": f"{config.alpha:g}",
        "ss_learning_rate": config.lr,
        "ss_lr_scheduler": config.schedule,
        "ss_lr_warmup_steps": config.warmup_steps,
        "ss_optimizer": config.optimizer,
        "ss_steps": step,
        "ss_max_train_steps": config.num_steps,
        "ss_batch_size_per_device": batch_size,
        "ss_num_train_images": num_examples,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_mixed_precision": config.dtype,
        "ss_seed": config.seed,
        "ss_caption_dropout_rate": config.instruction_dropout,
    }
    return {name: str(value) for name, value in said.items()}
