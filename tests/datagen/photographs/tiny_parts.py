"""Tiny random checkpoints of the classes that the model-backed parts load, as folders."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from ...model.qwen import byte_processor, tiny_mllm

LETTERS = [chr(code) for code in range(33, 127)]
WIDTH = 16
LATENT_CHANNELS = 2
"""The transformers see packed latents: four times as many."""


def write_detector(folder: Path) -> str:
    """OWLv2 that looks at four patches."""
    torch.manual_seed(0)
    layers = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1}
    layers |= {"num_attention_heads": 2}
    tokenizer = _clip_tokenizer(24)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Owlv2Config(
        text_config=layers | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 24},
        vision_config=layers | {"image_size": 32, "patch_size": 16},
        projection_dim=WIDTH,
    )
    model = Owlv2ForObjectDetection(config)
    with torch.no_grad():
        for weights in model.box_head.parameters():
            weights.mul_(0.01)  # boxes of about a patch, where the patch is
    model.save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_segmenter(folder: Path) -> str:
    """SAM 2 on pictures of 64 px."""
    torch.manual_seed(0)
    backbone = Sam2HieraDetConfig(
        hidden_size=8, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 2, 4, 8],
        global_attention_blocks=[3], window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": WIDTH,
    }
    prompt = {"hidden_size": WIDTH, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": WIDTH, "mlp_dim": 32, "num_attention_heads": 2}
    decoder |= {"iou_head_hidden_dim": WIDTH}
    config = Sam2Config(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    Sam2Model(config).save_pretrained(folder)
    return str(folder)


def write_depth(folder: Path) -> str:
    """Depth Anything on pictures of 28 px."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=28,
        patch_size=14, out_features=["stage1", "stage2"], apply_layernorm=True,
        reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=WIDTH, reassemble_factors=[4, 2],
        neck_hidden_sizes=[8, 8], fusion_hidden_size=8, head_hidden_size=8, patch_size=14,
    )  # fmt: skip
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    processor = DPTImageProcessorPil(size={"height": 28, "width": 28}, ensure_multiple_of=14)
    processor.save_pretrained(folder)
    return str(folder)


def write_fill(folder: Path) -> str:
    """FLUX.1 Fill: it also sees the masked picture and the mask."""
    extra = 4 * LATENT_CHANNELS + 4
    FluxFillPipeline(**_flux(extra)).save_pretrained(folder)
    return str(folder)


def write_depth_painter(folder: Path) -> str:
    """FLUX.1 Depth: it also sees the depth."""
    FluxControlPipeline(**_flux(4 * LATENT_CHANNELS)).save_pretrained(folder)
    return str(folder)


def write_chat(folder: Path) -> str:
    """Qwen2.5-VL with a vocabulary of bytes."""
    processor = byte_processor()
    tiny_mllm(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _flux(extra_channels: int) -> dict[str, object]:
    torch.manual_seed(0)
    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=WIDTH,
        bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
    )  # fmt: skip
    long_text = T5Config(
        vocab_size=len(t5), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": CLIPTextModel(text),
        "tokenizer": clip,
        "text_encoder_2": T5EncoderModel(long_text),
        "tokenizer_2": t5,
        "transformer": FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS + extra_channels, out_channels=4 * LATENT_CHANNELS,
            num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        ),
        "vae": AutoencoderKL(
            block_out_channels=(4,), layers_per_block=1, latent_channels=LATENT_CHANNELS,
            norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
            shift_factor=0.1, scaling_factor=1.5,
        ),
    }  # fmt: skip


def _clip_tokenizer(max_length: int = 77) -> CLIPTokenizer:
    ends = ["<|startoftext|>", "<|endoftext|>"]
    words = [
        *LETTERS,
        *(f"{letter}</w>" for letter in LETTERS),
        *ends,
    ]  # OWLv2 skips number 0 first
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=max_length)


def _t5_tokenizer() -> T5Tokenizer:
    words = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *LETTERS]
    return T5Tokenizer(vocab=[(word, -1.0) for word in words], extra_ids=0)
