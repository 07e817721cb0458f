import errno
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from step1x_edit.editor import Editor
from step1x_edit.errors import Step1XEditError
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.request import RuntimeConfig
from step1x_edit.training.feature_cache import ABANDONED_S, UNFINISHED, FeatureCache, FeatureKeys

KEY = "ab" + "0" * 62
TENSORS = {
    "tokens": torch.arange(12.0).reshape(3, 4),
    "features": torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
}


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "cache")


def test_what_was_written_is_read_to_the_bit(cache):
    assert not cache.holds(KEY)
    cache.write(KEY, TENSORS)
    assert cache.holds(KEY)
    read = cache.read(KEY)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert [path.name for path in cache.folder.rglob("*") if path.is_file()] == [
        f"{KEY}.safetensors"
    ]


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b + b"0", lambda b: b"", lambda b: b[:5], lambda b: b"\xff" * 99],
)
def test_an_entry_of_the_wrong_length_is_not_held(cache, damage):
    cache.write(KEY, TENSORS)
    path = cache.path(KEY)
    path.write_bytes(damage(path.read_bytes()))
    assert not cache.holds(KEY)
    with pytest.raises(Step1XEditError, match="start again"):
        cache.read(KEY)
    assert not path.exists()
    cache.write(KEY, TENSORS)
    assert cache.holds(KEY)


def test_a_flipped_bit_is_noticed_when_it_is_read(cache):
    cache.write(KEY, TENSORS)
    path = cache.path(KEY)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert cache.holds(KEY)
    with pytest.raises(Step1XEditError, match="checksum"):
        cache.read(KEY)
    assert not cache.holds(KEY)


def test_several_writers_of_one_entry_do_not_disturb_one_another(cache):
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            list(pool.map(lambda _: cache.write(KEY, TENSORS), range(8)))
            assert torch.equal(cache.read(KEY)["tokens"], TENSORS["tokens"])
    assert not list(cache.folder.rglob(f"*{UNFINISHED}"))


def test_only_what_a_killed_process_left_is_deleted(cache):
    cache.write(KEY, TENSORS)
    old, new = (cache.path(KEY).with_name(f"{name}{UNFINISHED}") for name in ("old", "new"))
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    before = time.time() - ABANDONED_S - 60
    os.utime(old, (before, before))
    cache.remove_abandoned()
    assert not old.exists()
    assert new.exists()
    assert cache.holds(KEY)


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(cache, monkeypatch):
    def full(path, _):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Step1XEditError, match=r"No space left on device.*make room") as error:
        cache.write(KEY, TENSORS)
    assert "\n" not in str(error.value)
    assert not [path for path in cache.folder.rglob("*") if path.is_file()]


def load(folder):
    return Step1XEditPipeline.from_pretrained(folder)


def names(pipeline):
    keys = FeatureKeys(pipeline)
    return keys.latents("0" * 64, (64, 64)), keys.features("0" * 64, (64, 64), "make it darker")


def test_names_follow_every_part_of_the_model_that_matters(tiny_model):
    latents, features = names(load(tiny_model))
    assert names(load(tiny_model)) == (latents, features)

    def changed(change):
        pipeline = load(tiny_model)
        change(pipeline)
        now = names(pipeline)
        return now[0] != latents, now[1] != features

    def scale(module):
        with torch.no_grad():
            next(module.parameters()).mul_(1.001)

    assert changed(lambda p: scale(p.transformer)) == (False, False)
    assert changed(lambda p: scale(p.vae)) == (True, False)
    assert changed(lambda p: scale(p.text_encoder)) == (False, True)
    assert changed(lambda p: p.text_encoder.bfloat16()) == (False, True)
    assert changed(lambda p: p.vae.register_to_config(scaling_factor=2.0)) == (True, False)
    assert changed(lambda p: setattr(p.processor, "chat_template", "other")) == (False, True)
    longer = {"max_length": 95}
    assert changed(
        lambda p: setattr(p, "instruction", p.instruction.model_copy(update=longer))
    ) == (False, True)


def test_names_follow_picture_size_mask_and_sentence(tiny_model):
    keys = FeatureKeys(load(tiny_model))
    sha, other, size = "0" * 64, "1" * 64, (64, 64)
    latents = [
        keys.latents(sha, size),
        keys.latents(other, size),
        keys.latents(sha, (64, 32)),
        keys.latents(sha, size, other),
    ]
    features = [
        keys.features(sha, size, "a"),
        keys.features(other, size, "a"),
        keys.features(sha, (64, 32), "a"),
        keys.features(sha, size, "b"),
        keys.features(sha, size, ""),
        keys.features(None, size, "a"),
    ]
    assert len({*latents, *features}) == 10
    assert keys.features(None, (64, 32), "a") == features[-1]


def test_names_follow_weights_that_wait_in_their_files(tiny_model, tmp_path):
    """Of blocks that are read when they run nothing is in the parameters."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    changed = load(other).text_encoder
    with torch.no_grad():
        changed.model.language_model.layers[0].mlp.down_proj.weight.mul_(1.01)
    changed.save_pretrained(other / "text_encoder")
    streamed = RuntimeConfig.checked(offload="disk")
    one, again, different = (
        names(Editor.load(str(folder), streamed).pipeline)
        for folder in (tiny_model, tiny_model, other)
    )
    assert one == again
    assert (one[0] == different[0], one[1] == different[1]) == (True, False)
