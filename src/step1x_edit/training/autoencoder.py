"""Train the mini model's autoencoder: a small `AutoencoderDC` that begins as the best linear codec.

Plain convolutions at full resolution are what costs on a CPU and what learns slowly.
`AutoencoderDC` (Chen et al. 2024, "Deep Compression Autoencoder") moves space into channels first,
and its shortcuts are lossless where the channels grow fourfold; so the network can be given, before
any training, the weights of the linear 8×8×3 → 16 codec of least squared error (principal
components), and training only has to add what a linear codec lacks.
"""

import logging
import signal
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from jaxtyping import Float
from torch import Tensor, nn

from step1x_edit.training.config import AutoencoderRun
from step1x_edit.training.dataset import picture_batches
from step1x_edit.training.loop import Pace, TrainingRun, Watch, run_loop

logger = logging.getLogger(__name__)

PIXEL_CHANNELS = 12
"""Channels at half resolution that hold the four pixels of three colours."""
CARRIER = 32.0
"""Constant in a spare channel that keeps the decoder's last RMS norm almost linear at the start."""
CODEC_BATCHES = 32
"""Batches that the linear codec is computed from; training begins after them."""
HELD_OUT_BATCHES = 4
HEADROOM = 1.1
"""Shift that keeps the decoder's last ReLU open at the start."""


def build_autoencoder() -> AutoencoderDC:
    """The mini model's autoencoder (8× smaller, 16 channels), its linear paths laid out."""
    model = AutoencoderDC(
        latent_channels=16,
        encoder_block_out_channels=(12, 12, 48, 192),  # pyright: ignore[reportArgumentType]
        encoder_layers_per_block=(0, 1, 1, 1),  # pyright: ignore[reportArgumentType]
        decoder_block_out_channels=(16, 16, 64, 256),  # pyright: ignore[reportArgumentType]
        decoder_layers_per_block=(0, 1, 1, 1),  # pyright: ignore[reportArgumentType]
        encoder_qkv_multiscales=((), (), (), ()),  # pyright: ignore[reportArgumentType]
        decoder_qkv_multiscales=((), (), (), ()),  # pyright: ignore[reportArgumentType]
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
    )
    encoder: Any = model.encoder
    decoder: Any = model.decoder
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(".norm"):  # of a residual block: the block begins as the identity
                module.weight.zero_()
                module.bias.zero_()
            elif isinstance(module, DCDownBlock2d | DCUpBlock2d) and module.shortcut:
                module.conv.weight.zero_()  # the lossless shortcut alone
                nn.init.zeros_(module.conv.bias)  # pyright: ignore[reportArgumentType] - these have a bias
        _set_taps(encoder.conv_in.conv, torch.eye(3), torch.zeros(3))
        out = decoder.conv_out.conv
        _set_taps(
            out,
            torch.eye(out.out_channels, out.in_channels),
            torch.full((out.out_channels,), -HEADROOM),
        )
        # The carrier enters behind the last shortcut and leaves at the norm: a large constant in
        # front of a convolution would make the first steps of training explode.
        half, norm = decoder.up_blocks[1][0].conv, decoder.norm_out
        half.bias[4 * PIXEL_CHANNELS : 4 * PIXEL_CHANNELS + 4] = CARRIER
        norm.weight.fill_(CARRIER / norm.weight.numel() ** 0.5)
        norm.bias.fill_(HEADROOM)
        norm.weight[PIXEL_CHANNELS:], norm.bias[PIXEL_CHANNELS:] = 0, 0
    return model


def _set_taps(conv: nn.Conv2d, matrix: Tensor, bias: Tensor) -> None:
    """Make a 3×3 convolution the 1×1 map `matrix` (out, in)."""
    conv.weight.zero_()
    conv.weight[:, :, 1, 1] = matrix
    assert conv.bias is not None
    conv.bias.copy_(bias)


@torch.no_grad()
def set_linear_codec(model: AutoencoderDC, pictures: Float[Tensor, "batch 3 height width"]) -> None:
    """Give a fresh `build_autoencoder` the principal components of `pictures`' 8×8 patches.

    Each latent channel is divided by the square root of its standard deviation: half-way between
    keeping pixel errors equal in latent space and whitening, so that fine channels are not lost in
    the diffusion noise.

    Args:
        model: From `build_autoencoder`.
        pictures: In [-1, 1].
    """
    encoder: Any = model.encoder
    decoder: Any = model.decoder
    features = encoder.conv_in(pictures)
    for block in encoder.down_blocks:
        features = block(features)
    patches = features.movedim(1, -1).flatten(0, -2)  # (N, 192), the pixels of a patch
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    values, components = values[-16:].flip(0), vectors[:, -16:].flip(1).T  # (16, 192)
    scale = values.pow(-0.25)[:, None]
    _set_taps(encoder.conv_out, components * scale, -(components * scale) @ mean)
    width = decoder.conv_in.out_channels
    matrix, bias = torch.zeros(width, 16), torch.zeros(width)
    matrix[: len(mean)], bias[: len(mean)] = (components / scale).T, mean
    _set_taps(decoder.conv_in, matrix, bias)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], errors averaged over all of them."""
    return float(-10 * torch.log10(((a.clamp(-1, 1) - b) / 2).square().mean()))


def train(config: AutoencoderRun, watch: Watch | None = None) -> signal.Signals | None:
    """Train, or go on training, and write the averaged weights to ``config.folder / "vae"``.

    Args:
        config: The run.
        watch: Sees each step.

    Returns:
        The signal that stopped the run; None when it is complete.
    """
    torch.manual_seed(config.seed)
    # Any: the annotations of diffusers know neither memory formats nor that outputs are no tuples.
    model = cast("Any", build_autoencoder()).to(memory_format=torch.channels_last)
    held_out = torch.cat([*islice(_pictures(config, held_out=True), HELD_OUT_BATCHES)])
    trained = nn.ModuleDict({"vae": model})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True
    )
    run = TrainingRun(
        config.folder,
        trained,
        [optimizer],
        config.lr,
        config.num_steps,
        decay_share=config.decay_share,
        keep_every=config.keep_every,
    )
    if not run.restore():
        set_linear_codec(model, torch.cat([*islice(_pictures(config), CODEC_BATCHES)]))
    logger.info("step %d: held-out PSNR %.2f dB", run.step, evaluate(model, held_out))

    def loss_of(pictures: Tensor) -> tuple[Tensor, int]:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            latents = model.encode(pictures).latent
            noise = torch.randn_like(latents) * latents.detach().float().std()
            latents = latents + noise * config.latent_noise * torch.rand(len(latents), 1, 1, 1)
            decoded = model.decode(latents).sample
        return nn.functional.mse_loss(decoded.float(), pictures), len(pictures)

    batches = _pictures(config, first_batch=CODEC_BATCHES + run.step)
    stopped = run_loop(run, batches, loss_of, pace=Pace.of(config), watch=watch)
    run.load_ema_into(trained)
    with torch.no_grad():
        model.register_to_config(scaling_factor=1 / float(model.encode(held_out).latent.std()))
    logger.info("step %d: held-out PSNR %.2f dB", run.step, evaluate(model, held_out))
    model.save_pretrained(config.folder / "vae")
    return stopped


@torch.no_grad()
def evaluate(model: AutoencoderDC, pictures: Tensor) -> float:
    """PSNR in dB of `pictures` after encoding and decoding, float32."""
    network = cast("Any", model)  # as in `train`
    return psnr(
        torch.cat(
            [network.decode(network.encode(part).latent).sample for part in pictures.split(16)]
        ),
        pictures,
    )


def _pictures(
    config: AutoencoderRun, *, first_batch: int = 0, held_out: bool = False
) -> Iterator[Tensor]:
    for batch in picture_batches(
        config.data, config.batch_size, first_batch=first_batch, held_out=held_out
    ):
        yield batch.to(memory_format=torch.channels_last)
