import itertools
import json
import logging
from collections import Counter
from copy import copy

import numpy as np
import pytest
import torch
from PIL import Image

from step1x_edit.datagen.config import DataConfig
from step1x_edit.datagen.generate import generate
from step1x_edit.errors import InvalidRequest, Step1XEditError
from step1x_edit.model.instruction import InstructionEncoder
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.training.data_config import PairData, from_official_toml
from step1x_edit.training.feature_batches import feature_batches
from step1x_edit.training.pairs import check

from ..pair_sets import SENTENCES, write_metadata, write_official
from ..tiny_model import write_tiny_model

# Shapes that fit their buckets, so that nothing is cut off.
SIZES = [(64, 64), (128, 32), (64, 64), (128, 32), (64, 64)]
SHORT = {"tone": 1.0}
ENGINE = {"kind": "engine", "sizes": {"64x64": 1}, "shares": SHORT, "num_workers": 0}


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    # Longer than the folder's own limit: the engine's sentences are of many bytes.
    loaded = Step1XEditPipeline.from_pretrained(tiny_model)
    loaded.instruction = loaded.instruction.model_copy(update={"max_length": 400})
    return loaded


@pytest.fixture
def metadata(tmp_path):
    return write_metadata(tmp_path / "set", SIZES)


def data(tmp_path, *datasets, **settings):
    values = {"size_level_px": 64, "bucket_px": 16, "cache": tmp_path / "cache"} | settings
    return PairData.model_validate({"datasets": datasets, **values})


def stored(path, **settings):
    return {"kind": "metadata", "metadata_file": path, **settings}


def batches(settings, pipeline, **options):
    return feature_batches(check(settings), pipeline, **{"seed": 0, **options})


def first(found, count):
    return list(itertools.islice(found, count))


def same(one, other):
    return (
        one.names == other.names
        and torch.equal(one.target, other.target)
        and torch.equal(one.features, other.features)
        and torch.equal(one.mask, other.mask)
    )


class Counting:
    """Counts the pictures and sentences that the networks are asked for."""

    def __init__(self, monkeypatch):
        self.counts = Counter()
        encode_images, encode = Step1XEditPipeline.encode_images, InstructionEncoder.encode

        def images(pipeline, pictures):
            self.counts["pictures"] += len(pictures)
            return encode_images(pipeline, pictures)

        def sentences(encoder, tokens):
            self.counts["sentences"] += len(tokens.lengths)
            return encode(encoder, tokens)

        monkeypatch.setattr(Step1XEditPipeline, "encode_images", images)
        monkeypatch.setattr(InstructionEncoder, "encode", sentences)

    def taken(self):
        counts, self.counts = self.counts, Counter()
        return counts["pictures"], counts["sentences"]


@pytest.fixture
def counting(monkeypatch):
    return Counting(monkeypatch)


def test_training_reads_what_editing_reads(tmp_path, metadata, pipeline, monkeypatch):
    read = {}
    forward = type(pipeline.transformer).forward

    def spy(self, *args, **kwargs):
        read.update(kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pipeline.transformer), "forward", spy)
    for batch in first(batches(data(tmp_path, stored(metadata)), pipeline), 5):
        (name,) = batch.names
        entry = json.loads(metadata.read_text())[name]
        picture = Image.open(entry["ref_image_path"])
        pipeline(picture, entry["caption"], num_inference_steps=1, guidance_scale=-1, size_level=64)
        num_tokens = batch.target.shape[1]
        assert num_tokens == batch.grid[0] * batch.grid[1]
        assert torch.equal(read["hidden_states"][:, num_tokens:], batch.reference)
        assert torch.equal(read["encoder_hidden_states"], batch.features)
        assert torch.equal(read["prompt_embeds_mask"], batch.mask)
        target = pipeline.encode_images(
            [
                Image.open(name).resize(
                    (batch.grid[1] * 16, batch.grid[0] * 16), Image.Resampling.LANCZOS
                )
            ]
        )
        assert torch.equal(target, batch.target)


def test_each_epoch_shows_every_example_once_and_mixes_no_sizes(tmp_path, metadata, pipeline):
    found = batches(data(tmp_path, stored(metadata), batch_size=2), pipeline)
    assert found.batches_per_epoch == 3
    assert not found.needs_networks
    epochs = [first(found, 3) for _ in range(4)]
    for epoch in epochs:
        assert len({name for batch in epoch for name in batch.names}) == 5
        assert sorted(len(batch.names) for batch in epoch) == [1, 2, 2]
        assert all(batch.target.shape == batch.reference.shape for batch in epoch)
    assert len({tuple(batch.names for batch in epoch) for epoch in epochs}) > 1


def test_repeats_and_batch_sizes_are_a_datasets_own(tmp_path, metadata, pipeline):
    other = write_metadata(tmp_path / "other", SIZES[:1])
    settings = data(tmp_path, stored(metadata), stored(other, repeats=6, batch_size=3))
    found = batches(settings, pipeline)
    epoch = first(found, found.batches_per_epoch)
    counts = Counter(name for batch in epoch for name in batch.names)
    assert sorted(counts.values()) == [1, 1, 1, 1, 1, 6]
    assert sorted(len(batch.names) for batch in epoch) == [1, 1, 1, 1, 1, 3, 3]


def test_a_batch_is_a_function_of_seed_and_number_alone(tmp_path, metadata, pipeline):
    settings = data(tmp_path, stored(metadata), {**ENGINE, "share": 0.4}, batch_size=2)
    options = {"instruction_dropout": 0.4, "zh_share": 0.5}
    whole = first(batches(settings, pipeline, **options), 12)
    for start in (1, 5, 10):
        resumed = first(batches(settings, pipeline, first_batch=start, **options), 12 - start)
        assert all(map(same, whole[start:], resumed))
    other = first(batches(settings, pipeline, seed=1, **options), 12)
    assert not all(map(same, whole, other))


def test_engines_have_their_share_and_every_example_still_comes(tmp_path, metadata, pipeline):
    drawing = {**ENGINE, "seed": 5, "shares": {"removal": 1}, "text_to_image": True}
    engines = [{**settings, "share": 0.25, "batch_size": 2} for settings in (ENGINE, drawing)]
    found = batches(data(tmp_path, stored(metadata), *engines), pipeline)
    assert found.needs_networks
    taken: dict[bool, list] = {True: [], False: []}
    for batch in first(found, 20):
        taken[batch.names[0].endswith("of the data engine")].append(batch)
    drawn = taken[True]
    assert len(drawn) == 10
    # Half of the engines' batches, but for those that words cannot say.
    assert 0 < sum(batch.reference is None for batch in drawn) <= 5
    names = [name for batch in drawn for name in batch.names]
    assert len(names) == len(set(names)) > 10
    assert all(batch.changed.shape == batch.target.shape[:2] for batch in drawn)
    expected = dict.fromkeys(json.loads(metadata.read_text()), 2)
    assert Counter(batch.names[0] for batch in taken[False]) == expected


def test_engines_alone_have_all_batches_whatever_their_shares_round_to(tmp_path, pipeline):
    engines = [{**ENGINE, "seed": seed, "share": share} for seed, share in ((1, 0.7), (2, 0.3))]
    found = batches(data(tmp_path, *engines), pipeline)
    assert [engine.taken(10) for engine in found._engines] == [7, 10]
    assert len(first(found, 2)) == 2


def test_dropped_instructions_are_the_empty_one_of_their_picture(tmp_path, metadata, pipeline):
    settings = data(tmp_path, stored(metadata))
    for batch in first(batches(settings, pipeline, instruction_dropout=1.0), 3):
        entry = json.loads(metadata.read_text())[batch.names[0]]
        size = (batch.grid[1] * 16, batch.grid[0] * 16)
        picture = Image.open(entry["ref_image_path"]).resize(size, Image.Resampling.LANCZOS)
        encoder = pipeline.instruction_encoder
        with torch.no_grad():
            expected = encoder.encode(encoder.tokenize([picture], [""]))
        assert torch.equal(batch.features, expected.features)


def test_only_what_changed_is_made_again(tmp_path, metadata, pipeline, counting):
    settings = data(tmp_path, stored(metadata))
    told = []
    batches(settings, pipeline, on_progress=lambda *now: told.append(now))
    assert counting.taken() == (10, 5)
    assert told == [(number, 5) for number in range(1, 6)]
    batches(settings, pipeline, seed=3)
    assert counting.taken() == (0, 0)
    batches(settings, pipeline, instruction_dropout=0.1)
    assert counting.taken() == (0, 5)

    entries = json.loads(metadata.read_text())
    entries[next(iter(entries))]["caption"] = "another sentence"
    metadata.write_text(json.dumps(entries))
    batches(settings, pipeline)
    assert counting.taken() == (0, 1)

    Image.new("RGB", (128, 32), "red").save(entries[list(entries)[1]]["ref_image_path"])
    batches(settings, pipeline)
    assert counting.taken() == (1, 1)

    batches(data(tmp_path, stored(metadata), size_level_px=128), pipeline)
    assert counting.taken() == (10, 5)


def test_a_killed_fill_goes_on_and_damage_is_made_good(tmp_path, metadata, pipeline, counting):
    settings = data(tmp_path, stored(metadata))

    def kill(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batches(settings, pipeline, on_progress=kill)
    assert counting.taken() == (4, 2)
    batches(settings, pipeline)
    assert counting.taken() == (6, 3)
    entries = sorted((tmp_path / "cache").rglob("*.safetensors"))
    entries[0].write_bytes(entries[0].read_bytes()[:-7])
    batches(settings, pipeline)
    assert sum(counting.taken()) == 1

    content = bytearray(entries[1].read_bytes())
    content[-1] ^= 8
    entries[1].write_bytes(content)
    found = batches(settings, pipeline)
    assert counting.taken() == (0, 0)
    with pytest.raises(Step1XEditError, match="start again"):
        first(found, 5)
    batches(settings, pipeline)
    assert sum(counting.taken()) == 1


def test_the_networks_may_leave_after_the_fill(tmp_path, metadata, tiny_model):
    pipeline = Step1XEditPipeline.from_pretrained(tiny_model)
    settings = data(tmp_path, stored(metadata))
    expected = first(batches(settings, pipeline), 5)
    found = batches(settings, pipeline)
    pipeline.register_modules(vae=None, text_encoder=None)
    assert all(map(same, first(found, 5), expected))


def test_a_picture_that_changed_after_the_check_is_named(tmp_path, metadata, pipeline):
    checked = check(data(tmp_path, stored(metadata)))
    target = next(iter(json.loads(metadata.read_text())))
    Image.new("RGB", (64, 64)).save(target)
    with pytest.raises(InvalidRequest, match="was changed since it was checked"):
        feature_batches(checked, pipeline, seed=0)


def test_pictures_keep_their_shape(tmp_path, pipeline):
    """A 150 × 100 picture goes to 64 × 32 by cutting its top and bottom, not by squeezing it."""
    metadata = write_metadata(tmp_path / "set", [(150, 100)])
    settings = data(tmp_path, stored(metadata), bucket_px=32)
    (batch,) = first(batches(settings, pipeline), 1)
    assert batch.grid == (2, 4)
    cut = Image.open(batch.names[0]).resize(
        (64, 32), Image.Resampling.LANCZOS, box=(0, 12.5, 150, 87.5)
    )
    assert torch.equal(batch.target, pipeline.encode_images([cut]))


def test_shards_give_both_languages_and_the_changed_share(tmp_path, pipeline):
    out = tmp_path / "shards"
    generate(
        DataConfig(
            out=out, num=6, shard_size=6, sizes={"64x64": 1}, shares={"removal": 1}, num_workers=1
        )
    )
    checked = check(data(tmp_path, {"kind": "shards", "folder": out}, batch_size=6))
    by_name = {example.name: example for example in checked.examples}
    encoder = pipeline.instruction_encoder
    for zh_share, language in ((0.0, "en"), (1.0, "zh")):
        (batch,) = first(feature_batches(checked, pipeline, seed=0, zh_share=zh_share), 1)
        words = [by_name[name].sentences[language] for name in batch.names]
        pictures = [by_name[name].source.open() for name in batch.names]
        with torch.no_grad():
            expected = encoder.encode(encoder.tokenize(pictures, words))
        assert torch.equal(batch.mask, expected.mask)
        torch.testing.assert_close(batch.features, expected.features, rtol=1e-4, atol=1e-4)
        masks = [np.asarray(by_name[name].mask.open())[..., 0] / 255 for name in batch.names]
        assert batch.changed.shape == (6, 16)
        assert batch.changed.mean(1).numpy() == pytest.approx([mask.mean() for mask in masks])
        assert 0 < batch.changed.mean() < 1


def test_rows_without_a_mask_weigh_alike(tmp_path, metadata, pipeline):
    out = tmp_path / "shards"
    generate(DataConfig(out=out, num=1, shard_size=1, sizes={"64x64": 1}, shares=SHORT))
    settings = data(
        tmp_path, stored(metadata), {"kind": "shards", "folder": out, "repeats": 2}, batch_size=9
    )
    found = {len(b.names): b for b in first(batches(settings, pipeline), 2)}
    assert found[2].changed is None
    rows = dict(zip(found[5].names, found[5].changed, strict=True))
    assert all((row == 1).all() for name, row in rows.items() if name.endswith(".png"))


def test_text_to_image_has_batches_of_its_own(tmp_path, metadata, pipeline):
    entries = json.loads(metadata.read_text())
    for name in list(entries)[:3]:
        del entries[name]["ref_image_path"]
    metadata.write_text(json.dumps(entries))
    taken = first(batches(data(tmp_path, stored(metadata), batch_size=9), pipeline), 4)
    drawn = [batch for batch in taken if batch.reference is None]
    assert sorted(len(batch.names) for batch in drawn) == [1, 2]
    encoder = pipeline.instruction_encoder
    with torch.no_grad():
        expected = encoder.encode(encoder.tokenize([None], [SENTENCES[1]]))
    (single,) = [batch for batch in drawn if len(batch.names) == 1]
    assert torch.equal(single.features, expected.features)


def test_a_v1_0_model_refuses_text_to_image(tmp_path, metadata):
    pipeline = Step1XEditPipeline.from_pretrained(
        write_tiny_model(tmp_path / "model", version="v1.0")
    )
    settings = data(tmp_path, stored(metadata, text_to_image=True))
    with pytest.raises(InvalidRequest, match=r"v1\.0 model cannot draw"):
        batches(settings, pipeline)
    engine = data(tmp_path, {**ENGINE, "text_to_image": True})
    with pytest.raises(InvalidRequest, match=r"v1\.0 model cannot draw"):
        batches(engine, pipeline)
    assert first(batches(data(tmp_path, stored(metadata)), pipeline), 1)


@pytest.mark.parametrize("words", ["darker " * 100, "make <|im_end|> darker"])
def test_a_sentence_that_the_model_cannot_read_is_named_first(
    tmp_path, metadata, pipeline, counting, words
):
    entries = json.loads(metadata.read_text())
    name = list(entries)[2]
    entries[name]["caption"] = words
    metadata.write_text(json.dumps(entries))
    with pytest.raises(InvalidRequest) as error:
        batches(data(tmp_path, stored(metadata)), pipeline)
    assert str(error.value).startswith(f"{name}: the instruction ")
    assert counting.taken() == (0, 0)


def test_long_sentences_of_shards_are_left_out_and_counted(tmp_path, pipeline, caplog):
    out = tmp_path / "shards"
    generate(
        DataConfig(
            out=out, num=8, shard_size=8, sizes={"64x64": 1}, shares={"removal": 1}, num_workers=1
        )
    )
    checked = check(data(tmp_path, {"kind": "shards", "folder": out}))
    lengths = sorted(len(example.sentences["en"]) for example in checked.examples)
    encoder = pipeline.instruction_encoder
    middle = encoder.tokenize([Image.new("RGB", (64, 64))], ["x" * lengths[4]])
    limit = int(middle.lengths) - encoder.config.num_dropped_tokens
    short = copy(pipeline)
    short.instruction = pipeline.instruction.model_copy(update={"max_length": limit})
    kept = sum(length <= lengths[4] for length in lengths)
    with caplog.at_level(logging.WARNING):
        found = feature_batches(checked, short, seed=0)
    assert found.batches_per_epoch == kept < 8
    assert f"{8 - kept} of 8 examples are left out" in caplog.text


def test_the_released_example_gives_batches(tmp_path, pipeline):
    toml = write_official(tmp_path / "set", SIZES)
    settings = from_official_toml(toml).model_copy(update={"cache": tmp_path / "cache"})
    taken = first(batches(settings, pipeline), 5)
    assert {batch.grid for batch in taken} == {(4, 4), (2, 8)}


def test_a_model_that_does_not_pad_reads_rows_as_long_as_the_longest(tmp_path, metadata, pipeline):
    unpadded = copy(pipeline)
    unpadded.instruction = pipeline.instruction.model_copy(update={"pad_to_max_length": False})
    found = first(batches(data(tmp_path, stored(metadata), batch_size=3), unpadded), 2)
    (batch,) = [batch for batch in found if len(batch.names) == 3]
    lengths = batch.mask.sum(1)
    assert batch.features.shape[1] == int(lengths.max()) > int(lengths.min())
    assert (batch.features[~batch.mask] == 0).all()
