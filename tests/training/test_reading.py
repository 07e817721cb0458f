import numpy as np
import pytest
import torch

from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS
from step1x_edit.training.alignment import COLOUR_LABELS, OBJECT_LABELS
from step1x_edit.training.config import ReadingRun
from step1x_edit.training.mini import build_mini_processor, train_tokenizer
from step1x_edit.training.reading import (
    PHRASING_LABELS,
    ReadingTraining,
    SentenceBatches,
    sample_sentence,
    train,
)


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
    rng = np.random.default_rng(0)
    for _ in range(300):
        sentence, (phrasing, named, colour, *_) = sample_sentence(rng, language)
        assert "{" not in sentence
        assert phrasing in PHRASING_LABELS.values()
        for label, labels, table in (
            (named, OBJECT_LABELS, OBJECTS),
            (colour, COLOUR_LABELS, COLOURS),
        ):
            name = next(name for name, number in labels.items() if number == label)
            if name is not None:
                assert (table[name].zh if language == "zh" else name) in sentence


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
