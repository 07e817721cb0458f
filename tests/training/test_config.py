from itertools import takewhile
from pathlib import Path

import pytest
from torch import nn

from step1x_edit.errors import InvalidRequest
from step1x_edit.training.config import AutoencoderRun, EditRun, LoraRun, ReadingRun, load
from step1x_edit.training.trainer import ADAMW_SHARE, optimizers_of

CONFIGS = Path(__file__).parents[2] / "configs" / "train"
EDIT = "kind: edit\nfolder: run\nvae: vae\nprocessor: processor\nnum_steps: 10\n"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_and_begins_with_its_command(path):
    assert isinstance(load(path), AutoencoderRun | EditRun | LoraRun | ReadingRun)
    opening = "".join(takewhile(lambda line: line.startswith("#"), path.open(encoding="utf-8")))
    commands = ("python -m step1x_edit.training", "step1x train")
    assert any(f"{command} configs/train/{path.name}" in opening for command in commands)


def test_kind_chooses_the_settings(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(EDIT)
    run = load(path)
    assert isinstance(run, EditRun)
    assert (run.num_steps, run.vae) == (10, Path("vae"))
    path.write_text("kind: autoencoder\nfolder: run\ndata: {seed: 4}\n")
    run = load(path)
    assert isinstance(run, AutoencoderRun)
    assert run.data.seed == 4


def test_a_single_time_shift_is_the_range_that_holds_it_alone(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(EDIT + "time_shift: 10.0\n")
    run = load(path)
    assert isinstance(run, EditRun)
    assert run.time_shift == (10.0, 10.0)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (EDIT + "batchsize: 3\n", "batchsize"),
        (EDIT.replace("10", "0"), "num_steps"),
        (EDIT + "lr: -1\n", "lr"),
        (EDIT + "time_shift: [0.5, 2]\n", "time_shift"),
        (EDIT + "zh_share: 1.5\n", "zh_share"),
        (EDIT.replace("vae: vae\n", ""), "vae"),
        (EDIT.replace("edit", "lora"), "lora"),
        ("kind: [edit\n", "run.yaml"),
        ("", "run.yaml"),
    ],
)
def test_errors_are_one_line_that_names_the_file_and_the_setting(tmp_path, text, named):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as error:
        load(path)
    message = str(error.value)
    assert str(path) in message
    assert named in message
    assert "\n" not in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match=r"absent\.yaml"):
        load(tmp_path / "absent.yaml")


def test_the_reading_may_have_its_own_optimizers():
    trained = nn.ModuleDict(
        {
            "transformer": nn.ModuleDict({"connector": nn.Linear(2, 2), "rest": nn.Linear(2, 2)}),
            "text_encoder": nn.Linear(2, 2),
        }
    )
    whole, scales = optimizers_of(trained, 1e-3, reading_share=1.0)
    assert (len(whole), scales) == (2, (1.0, ADAMW_SHARE))
    apart, scales = optimizers_of(trained, 1e-3, reading_share=0.1)
    assert scales == pytest.approx((1.0, ADAMW_SHARE, 0.1, 0.1 * ADAMW_SHARE))
    named = {id(parameter): name for name, parameter in trained.named_parameters()}
    held = [
        {named[id(p)].split(".")[-2] for group in o.param_groups for p in group["params"]}
        for o in apart
    ]
    assert held == [
        {"rest"},
        {"rest"},
        {"connector", "text_encoder"},
        {"connector", "text_encoder"},
    ]
