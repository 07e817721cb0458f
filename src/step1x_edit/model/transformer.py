"""The diffusion transformer: predicts the velocity of picture tokens at one time.

FLUX's double- and single-stream blocks with the Step1X-Edit connector in front (arXiv 2504.17761),
under the parameter names of the published diffusers-layout folders. The pipeline, the trainer and
the samplers call `Step1XEditTransformer2DModel.forward`; offloading, quantisation, caches, LoRA and
parallel layouts are put on from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from step1x_edit.errors import CheckpointError
from step1x_edit.model.attention import rotary_table
from step1x_edit.model.blocks import (
    AdaLayerNormOut,
    Step1XEditSingleTransformerBlock,
    Step1XEditTransformerBlock,
    VectorEmbedder,
)
from step1x_edit.model.connector import Connector, sinusoid
from step1x_edit.model.guidance import ModelVersion
from step1x_edit.model.official_layout import read_into, transformer_rows, write_file
from step1x_edit.model.official_sizes import transformer_metadata, transformer_sizes


class Step1XEditTransformer2DModel(
    ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin
):
    """The Step1X-Edit transformer with its connector, v1.0 and v1.1.

    Args:
        patch_size: Always 1: pictures come in as tokens already.
        in_channels: Values per picture token.
        out_channels: Values per output token; None: as many as come in.
        num_layers: Number of double-stream blocks.
        num_single_layers: Number of single-stream blocks.
        attention_head_dim: Channels per attention head.
        num_attention_heads: Attention heads; heads times head channels is the model width.
        joint_attention_dim: Width of the connector's context tokens.
        timestep_in_dim: Number of sinusoid features of the timestep.
        vector_in_dim: Width of the connector's pooled vector.
        connector_in_channels: Width of the instruction encoder's features.
        connector_hidden_size: Width of the connector, equal to `joint_attention_dim`.
        connector_heads_num: Attention heads of the connector.
        connector_depth: Refiner blocks of the connector.
        guidance_embeds: Always False: the release has no guidance embedding.
        axes_dims_rope: Head channels per position axis (kind, row, column).
        connector_scale_factor: True for v1.0, which scales the connector's mean feature; False for
            v1.1. It is the only difference of the two networks.
    """

    _supports_gradient_checkpointing = True
    _gradient_checkpointing_func: Callable[..., Any] | None = None
    _no_split_modules: ClassVar[list[str]] = [
        "Step1XEditTransformerBlock",
        "Step1XEditSingleTransformerBlock",
        "RefinerBlock",
    ]
    _repeated_blocks: ClassVar[list[str]] = [
        "Step1XEditTransformerBlock",
        "Step1XEditSingleTransformerBlock",
    ]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["norm", "scale_factor"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        timestep_in_dim: int = 256,
        vector_in_dim: int = 768,
        connector_in_channels: int = 3584,
        connector_hidden_size: int = 4096,
        connector_heads_num: int = 32,
        connector_depth: int = 2,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        connector_scale_factor: bool = False,
    ) -> None:
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {tuple(axes_dims_rope)} add up to {sum(axes_dims_rope)}, "
                f"not to attention_head_dim {attention_head_dim}"
            )
        if joint_attention_dim != connector_hidden_size:
            raise ValueError(
                f"joint_attention_dim {joint_attention_dim} differs from connector_hidden_size "
                f"{connector_hidden_size}"
            )
        if patch_size != 1 or guidance_embeds:
            raise ValueError(
                f"patch_size {patch_size} and guidance_embeds {guidance_embeds}: "
                "only 1 and False exist in this architecture"
            )
        dim = num_attention_heads * attention_head_dim
        self.out_channels = out_channels or in_channels
        self.inner_dim = dim
        self.connector = Connector(
            connector_in_channels,
            connector_hidden_size,
            connector_heads_num,
            connector_depth,
            vector_in_dim,
            timestep_in_dim,
            connector_scale_factor,
        )
        self.time_embed = VectorEmbedder(timestep_in_dim, dim)
        self.vec_embed = VectorEmbedder(vector_in_dim, dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.x_embedder = nn.Linear(in_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            Step1XEditTransformerBlock(dim, attention_head_dim) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            Step1XEditSingleTransformerBlock(dim, attention_head_dim)
            for _ in range(num_single_layers)
        )
        self.norm_out = AdaLayerNormOut(dim)
        self.proj_out = nn.Linear(dim, self.out_channels)
        self.gradient_checkpointing = False

    @property
    def version(self) -> ModelVersion:
        """Release that this network belongs to, told by the connector's scale factor."""
        return "v1.0" if self.config["connector_scale_factor"] else "v1.1"

    @classmethod
    def from_official(
        cls, path: str | Path, *, torch_dtype: torch.dtype | None = None, **config: Any
    ) -> Step1XEditTransformer2DModel:
        """Load the official single file, v1.0 or v1.1.

        Sizes are read off the file's shapes. At the released width nothing need be given; at
        another, `axes_dims_rope` and `connector_heads_num`, unless the file's metadata names them.

        Args:
            path: `step1x-edit-*.safetensors`.
            torch_dtype: Convert the weights to it; None keeps the file's.
            config: Arguments of this class that the file does not tell.

        Returns:
            The model in evaluation mode on the CPU. Tensors are read one by one, so it is never in
            memory twice.

        Raises:
            CheckpointError: Not such a file, a size is left open, or a tensor is missing,
                unexpected or of another shape.
        """
        path = Path(path)
        sizes = transformer_sizes(path, config)
        try:
            with torch.device("meta"):
                model = cls(**sizes)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        read_into(model, transformer_rows(model.state_dict()), path, torch_dtype)
        return model.eval()

    def to_official(self, path: str | Path) -> None:
        """Write the official single file; `from_official` of it gives this model back.

        Args:
            path: Target, replaced when the new file is whole.

        Raises:
            CheckpointError: The model carries adapters or quantised layers.
        """
        metadata = transformer_metadata(self.config, self.version)
        write_file(self, transformer_rows(self.state_dict()), Path(path), metadata)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch image channels"],
        encoder_hidden_states: Float[Tensor, "batch text features"],
        prompt_embeds_mask: Int[Tensor, "batch text"] | Bool[Tensor, "batch text"],
        timestep: Float[Tensor, " batch"],
        img_ids: Float[Tensor, "*batch image axes"],
        txt_ids: Float[Tensor, "*batch text axes"],
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Float[Tensor, "batch image out"]]:
        """Predict the velocity of every picture token.

        Args:
            hidden_states: Picture tokens: the noisy target, then the reference, if any.
            encoder_hidden_states: Features of the instruction encoder, zero-padded.
            prompt_embeds_mask: Non-zero at real features.
            timestep: Flow-matching time in [0, 1]; 1 is pure noise.
            img_ids: Positions of the picture tokens (`model.guidance.prepare_ids`), one table for
                all rows or one per row. One table is faster.
            txt_ids: Positions of the text tokens, zeros in v1.0 and v1.1.
            return_dict: Whether to wrap the result in a `Transformer2DModelOutput`.

        Returns:
            Velocities at all picture tokens; those at reference tokens mean nothing.
        """
        table = rotary_table(torch.cat([txt_ids, img_ids], dim=-2), self.config["axes_dims_rope"])
        context, pooled = self.connector(encoder_hidden_states, timestep, prompt_embeds_mask)
        time_features = sinusoid(timestep, self.config["timestep_in_dim"]).to(hidden_states.dtype)
        temb = nn.functional.silu(self.time_embed(time_features) + self.vec_embed(pooled))
        image = self.x_embedder(hidden_states)
        text = self.context_embedder(context)

        training_cheaply = self.gradient_checkpointing and torch.is_grad_enabled()
        recompute = self._gradient_checkpointing_func if training_cheaply else None
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            if recompute is None:
                text, image = block(image, text, temb, table)
            else:
                text, image = recompute(block, image, text, temb, table)

        velocity = self.proj_out(self.norm_out(image, temb))
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
