"""Requests: what they refuse, in which words, and what a result remembers."""

import json

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from step1x_edit.errors import InvalidRequest
from step1x_edit.request import (
    EditRequest,
    EditResult,
    Provenance,
    RuntimeConfig,
    read_provenance,
)

PROVENANCE = Provenance(
    model="mini", model_hash="ab", prompt="a", seed=1, num_steps=2, guidance=-1.0,
    size_level_px=128, width=128, height=128,
)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_steps": 0}, "num_steps is 0, the limit is 1 to 1000: "),
        ({"num_steps": 1001}, "num_steps is 1001, the limit is 1 to 1000: "),
        ({"num_steps": "many"}, "num_steps is 'many', the limit is 1 to 1000: "),
        ({"seed": -1}, "seed is -1, the limit is 0 to 9223372036854775807: "),
        ({"seed": 2**63}, "the limit is 0 to 9223372036854775807: "),
        ({"guidance": 0}, "guidance is 0, the limit is 1 to 30, or -1 for none: "),
        ({"guidance": -0.5}, "guidance is -0.5, the limit is 1 to 30, or -1 for none: "),
        ({"guidance": 30.5}, "guidance is 30.5, the limit is 1 to 30, or -1 for none: "),
        ({"guidance": float("nan")}, "the limit is 1 to 30, or -1 for none: "),
        ({"keep": "some"}, "keep is 'some', the choices are auto, always, off: "),
        ({"width": 100}, "width is 100, the limit is 16 to 4096 in steps of 16: "),
        ({"num_images": 17}, "num_images is 17, the limit is 1 to 16: "),
        ({"max_pixels": 0}, "max_pixels is 0, the limit is 1 and more: "),
        ({"image": "a.png", "size_level_px": 63}, "the limit is 64 to 2048: "),
        ({"prompt": " \n"}, "prompt is empty: "),
        ({"prompt": "x" * 8001}, "prompt has 8001 characters, the limit is 8000: "),
        ({"image": 5}, "image is 5, the limit is a file path or an opened picture: "),
        ({"strength": 1}, "strength: unknown setting: the settings are image, prompt, "),
        ({"mask": "m.png"}, "a mask needs a picture"),
        ({"image": "a.png", "width": 64}, "width and height are for drawing"),
        ({"size_level_px": 512}, "size_level_px is for edits"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, says):
    with pytest.raises(InvalidRequest) as refusal:
        EditRequest.checked(**{"prompt": "a"} | settings)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_bad_setting_is_named_once():
    with pytest.raises(InvalidRequest) as refusal:
        EditRequest.checked(num_steps=0, image=5)
    parts = str(refusal.value).split("; ")
    assert sorted(part.split()[0] for part in parts) == ["image", "num_steps", "prompt"]


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", ""])
def test_unknown_devices_are_refused(device):
    with pytest.raises(InvalidRequest, match="auto, cpu, mps, cuda or cuda:N"):
        RuntimeConfig.checked(device=device)


def test_limits_belong_to_what_is_allowed():
    for settings in (
        {"num_steps": 1}, {"num_steps": 1000}, {"seed": 0}, {"seed": 2**63 - 1},
        {"guidance": -1}, {"guidance": 1}, {"guidance": 30}, {"num_images": 16},
        {"max_pixels": None}, {"prompt": "x" * 8000}, {"width": 16, "height": 4096},
        {"num_steps": "28"},
    ):  # fmt: skip
        EditRequest.checked(**{"prompt": "a"} | settings)
    RuntimeConfig.checked(device="cuda:1", threads=1, dtype="bfloat16")


def test_requests_cannot_be_changed():
    request = EditRequest(prompt="a", image=Image.new("RGB", (2, 2)))
    with pytest.raises(ValidationError):
        request.prompt = "b"


def test_every_setting_has_its_help_and_a_schema():
    for model in (EditRequest, RuntimeConfig):
        schema = model.model_json_schema()
        json.dumps(schema)
        for name, setting in model.model_fields.items():
            assert setting.description, name
            assert schema["properties"][name]["description"] == setting.description


def test_each_picture_of_a_result_is_saved_with_its_number(tmp_path):
    pictures = [Image.fromarray(np.full((4, 6, 3), value, np.uint8)) for value in (10, 200)]
    result = EditResult(images=pictures, provenance=PROVENANCE, seconds={})
    paths = result.save([tmp_path / "a.png", tmp_path / "b.png"])
    for index, path in enumerate(paths):
        made = read_provenance(path)
        assert made == PROVENANCE.model_copy(update={"index": index})
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(pictures[index]))


def test_provenance_of_later_versions_is_read_and_of_others_not(tmp_path):
    from step1x_edit.images import save

    told = json.loads(PROVENANCE.model_dump_json())
    for text, wanted in (
        (json.dumps(told | {"new_field": 1}), PROVENANCE),
        (json.dumps({"model": "x"}), None),
        ("no JSON", None),
    ):
        save(Image.new("RGB", (2, 2)), tmp_path / "a.png", text)
        assert read_provenance(tmp_path / "a.png") == wanted
