import signal

import pytest
import torch

from step1x_edit.training import autoencoder
from step1x_edit.training.autoencoder import (
    build_autoencoder,
    evaluate,
    psnr,
    set_linear_codec,
    train,
)
from step1x_edit.training.config import AutoencoderRun, DataSettings
from step1x_edit.training.dataset import picture_batches


@pytest.fixture(scope="module")
def pictures():
    settings = DataSettings(sizes={"64x64": 1.0}, num_workers=0)
    return next(picture_batches(settings, batch_size=32))


def principal_components(pictures, count=16):
    """The best linear codec of 8×8 patches, written out."""
    batch, _, height, width = pictures.shape
    patches = pictures.reshape(batch, 3, height // 8, 8, width // 8, 8)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, 192).double()
    mean = patches.mean(0)
    components = torch.linalg.svd(patches - mean, full_matrices=False).Vh[:count]
    coded = (patches - mean) @ components.T @ components + mean
    shape = (batch, height // 8, width // 8, 3, 8, 8)
    return coded.reshape(shape).permute(0, 3, 1, 4, 2, 5).reshape(pictures.shape).float()


def test_psnr_of_a_known_error():
    clean = torch.zeros(2, 3, 8, 8)
    assert psnr(clean + 0.2, clean) == pytest.approx(20)  # 0.2 of a range of 2


def test_fresh_autoencoder_is_the_best_linear_codec(pictures):
    model = build_autoencoder()
    set_linear_codec(model, pictures)
    best = psnr(principal_components(pictures), pictures)
    assert best > 20
    assert evaluate(model, pictures) == pytest.approx(best, abs=0.3)


def test_latents_are_sixteen_channels_at_an_eighth(pictures):
    model = build_autoencoder()
    set_linear_codec(model, pictures)
    with torch.no_grad():
        latents = model.encode(pictures).latent
    assert latents.shape == (32, 16, 8, 8)
    # Divided by √σ, so what is left is √σ: the strongest component comes first.
    deviations = latents.movedim(1, 0).flatten(1).std(1)
    assert (deviations[:-1] >= deviations[1:] * 0.999).all()
    assert latents.movedim(1, 0).flatten(1).mean(1).abs().max() < 1e-3


def test_a_stopped_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "CODEC_BATCHES", 2)

    def run(name, stop_at=None):
        data = DataSettings(sizes={"64x64": 1.0}, num_workers=0)
        config = AutoencoderRun(
            kind="autoencoder", folder=tmp_path / name, num_steps=4, batch_size=8, data=data
        )

        def watch(report):
            if report.step == stop_at:
                signal.raise_signal(signal.SIGTERM)

        return train(config, watch)

    assert run("whole") is None
    assert run("stopped", stop_at=2) == signal.SIGTERM
    assert run("stopped") is None
    one, other = (
        (tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("whole", "stopped")
    )
    assert one == other
