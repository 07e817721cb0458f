import numpy as np
import pytest
import torch

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators.base import Clause, Edit
from step1x_edit.datagen.scene import Scene
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS, plural
from step1x_edit.training.config import DataSettings, ReadingRun
from step1x_edit.training.mini import build_mini_processor, train_tokenizer
from step1x_edit.training.reading import (
    ReadingTraining,
    SentenceBatches,
    sample_sentence,
    train,
)
from step1x_edit.training.slots import NUM_CLASSES, SLOTS, labels_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    build_mini_processor(train_tokenizer(vocab_size=1200)).save_pretrained(folder / "processor")
    return ReadingRun(
        kind="reading",
        folder=folder / "run",
        processor=folder / "processor",
        batch_size=32,
        num_steps=20,
        lr=3e-3,
        bf16=False,
    )


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_sentence_says_what_its_labels_say(language):
    rng, atlas, data = np.random.default_rng(0), Atlas(), DataSettings()
    slots = ("kind", *SLOTS)
    read = dict.fromkeys(slots, 0)
    for _ in range(600):
        sentence, labels = sample_sentence(rng, data, atlas, language)
        assert "{" not in sentence
        assert all(0 <= label < count for label, count in zip(labels, NUM_CLASSES, strict=True))
        for slot, label in zip(slots, labels, strict=False):
            read[slot] += label > 0
        first = dict(zip(slots, labels, strict=False))
        for slot in ("object", "new_object"):
            if first[slot]:
                name = list(OBJECTS)[first[slot] - 1]
                said = (OBJECTS[name].zh,) if language == "zh" else (name, plural(name))
                assert any(word in sentence for word in said)
    assert all(read.values())


def test_labels_of_a_compound_instruction():
    scene = Scene(np.zeros((8, 8, 3), np.float32), None, ())
    added = {"a_object": "a red cat", "where": "on the left and in the middle"}
    edit = Edit(
        scene, scene, "addition", {"en": added},
        second=Clause("colour", {"en": {"object": "bigger dog on the right", "colour": "blue"}}),
    )  # fmt: skip
    sentence = (
        "add a red cat on the left and in the middle, then make the bigger dog on the right blue"
    )
    labels = labels_of(edit, sentence, "en")
    slots = ("kind", *SLOTS)
    first = dict(zip(slots, labels[: len(slots)], strict=True))
    second = dict(zip(slots, labels[len(slots) :], strict=True))
    cat, dog, red, blue = (
        1 + list(table).index(name)
        for table, name in ((OBJECTS, "cat"), (OBJECTS, "dog"), (COLOURS, "red"), (COLOURS, "blue"))
    )
    assert (first["object"], first["colour"], first["where"]) == (cat, red, 0b011)
    assert (second["object"], second["colour"], second["where"]) == (dog, blue, 0)
    assert second["described"] > 0
    assert first["described"] == 0
    unsaid = labels_of(edit, "add something", "en")
    assert unsaid[0] == first["kind"]
    assert not any(unsaid[1 : len(slots)])


def test_the_same_batch_number_gives_the_same_sentences(run):
    tokenize = ReadingTraining(run).encoder.tokenizer
    first, again = (next(iter(SentenceBatches(run, tokenize, 7))) for _ in range(2))
    other = next(iter(SentenceBatches(run, tokenize, 8)))
    assert torch.equal(first.tokens.input_ids, again.tokens.input_ids)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)


@pytest.mark.slow
def test_reading_learns_and_another_run_can_begin_with_it(run):
    fresh = ReadingTraining(run)
    batch = next(iter(SentenceBatches(run, fresh.encoder.tokenizer, 0)))
    before, _ = fresh.loss_of(batch)
    train(run)
    goes_on = ReadingTraining(run.model_copy(update={"start": run.folder / "model"}))
    learnt = torch.load(max((run.folder / "checkpoints").iterdir()))["ema"]
    for name, parameter in goes_on.trained.named_parameters():
        if name.startswith("heads."):  # thrown away by the run, so taken from its checkpoint
            parameter.data.copy_(learnt[name])
        else:
            assert torch.equal(parameter, learnt[name])
    assert goes_on.loss_of(batch)[0] < 0.7 * before
