"""The release's texts: fetched, checked, kept, or read from a checkout; source is never run."""

from __future__ import annotations

import hashlib

import pytest

from step1x_edit.apps import cli
from step1x_edit.checkpoints import constants
from step1x_edit.checkpoints import download as downloading
from step1x_edit.checkpoints.constants import release_text, with_prefix
from step1x_edit.errors import CheckpointError
from step1x_edit.model.instruction_config import RELEASE_V1, read_instruction
from step1x_edit.model.release_text import RELEASE_TEXTS, ReleaseText, keep_text, kept_text

from ..file_server import Site, serving

NAME = "Qwen25VL_7b_PREFIX"
TEXT = "Look at the picture.\nThen follow the “instruction”:\n" * 7
FILE = "modules/conditioner.py"
SOURCE = f"""import torch

raise SystemExit("this file was run")

{NAME} = '''{TEXT}'''


class Embedder(torch.nn.Module):
    pass
"""
JUDGE = "GEdit-Bench/viescore/vie_prompts.py"


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server with files of the release's form, and the digests of what is in them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(downloading, "PAUSE_S", 0.0)
    monkeypatch.setitem(RELEASE_TEXTS, NAME, ReleaseText(FILE, sha256(TEXT)))
    others = [name for name in RELEASE_TEXTS if name != NAME]
    for name in others:
        monkeypatch.setitem(RELEASE_TEXTS, name, ReleaseText(JUDGE, sha256(f"about {name}")))
    judge = "\n".join(f'{name} = """about {name}"""' for name in others)
    with serving(Site({FILE: SOURCE.encode(), JUDGE: judge.encode()})) as served:
        monkeypatch.setattr(constants, "SOURCE_URL", served.url)
        yield served


def test_the_table_has_the_prefix_of_the_released_models():
    assert RELEASE_V1.prefix_constant in RELEASE_TEXTS
    assert all(len(bytes.fromhex(text.sha256)) == 32 for text in RELEASE_TEXTS.values())


def test_a_text_is_fetched_once_and_kept(site, tmp_path):
    assert kept_text(NAME) is None
    assert release_text(NAME) == TEXT
    assert kept_text(NAME) == TEXT
    assert release_text(NAME, offline=True) == TEXT
    assert [name for name, _ in site.requests] == [FILE]
    assert with_prefix(RELEASE_V1, offline=True).prefix == TEXT
    # What a pipeline finds without asking anybody.
    assert read_instruction(tmp_path).with_kept_prefix().require_prefix() == TEXT


def test_a_copy_that_was_changed_is_not_used(site):
    release_text(NAME)
    keep_text(NAME, TEXT + " ")
    assert kept_text(NAME) is None
    assert release_text(NAME) == TEXT
    assert len(site.requests) == 2


def test_another_text_is_refused(site):
    site.files[FILE] = SOURCE.replace("follow", "ignore").encode()
    with pytest.raises(CheckpointError, match="is not the text of the release") as error:
        release_text(NAME)
    assert sha256(TEXT) in str(error.value)
    assert "\n" not in str(error.value)
    assert kept_text(NAME) is None


@pytest.mark.parametrize(
    "source",
    ["def broken(:", "x = 1", f"{NAME} = 3", f"{NAME} = open('x').read()", f"{NAME}: str"],
)
def test_files_without_the_text_are_refused_in_one_line(site, source):
    site.files[FILE] = source.encode()
    with pytest.raises(CheckpointError, match=NAME) as error:
        release_text(NAME)
    assert "\n" not in str(error.value)


def test_a_checkout_is_read_instead_of_the_network(site, tmp_path):
    checkout = tmp_path / "Step1X-Edit"
    (checkout / "modules").mkdir(parents=True)
    (checkout / FILE).write_text(SOURCE, encoding="utf-8")
    assert release_text(NAME, official_source=checkout, offline=True) == TEXT
    assert site.requests == []
    with pytest.raises(CheckpointError, match=r"vie_prompts\.py cannot be read .*checkout"):
        release_text("_prompts_0shot_rule_PQ", official_source=checkout)
    with pytest.raises(CheckpointError, match="'nonsense' is no text of the release"):
        release_text("nonsense")


def test_without_it_a_released_model_says_how_to_get_it(site):
    for refusal in (
        lambda: release_text(NAME, offline=True),
        lambda: with_prefix(RELEASE_V1, offline=True),
        RELEASE_V1.require_prefix,
    ):
        with pytest.raises(CheckpointError, match=f"{NAME}.*models pull constants.*--official-s"):
            refusal()
    assert site.requests == []
    del site.files[FILE]
    with pytest.raises(CheckpointError, match=r"HTTP 404.*models pull constants"):
        release_text(NAME)


def test_models_pull_constants_gets_them_all(site, capsys, tmp_path):
    assert cli.run(["models", "pull", "constants"]) == 0
    assert capsys.readouterr().out == "the release's 5 texts are here and genuine\n"
    assert all(kept_text(name) for name in RELEASE_TEXTS)
    site.files[JUDGE] = b"changed = 1"
    (tmp_path / "cache" / "step1x-edit" / "constants" / "_prompts_0shot_rule_PQ.txt").unlink()
    assert cli.run(["models", "pull", "constants"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "_prompts_0shot_rule_PQ" in captured.err
