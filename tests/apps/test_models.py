"""What a path holds: shown, and refused in one line where it is no model that runs. No torch."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from step1x_edit.apps import cli
from step1x_edit.checkpoints.catalog import CATALOG

from ..file_server import Site, serving
from .command import files_of, refused, run

ZERO = np.zeros(2, np.float16)
V1P1 = "step1x-edit-v1p1-official.safetensors"
CONNECTOR = {"connector.S.x": ZERO, "double_blocks.0.x": ZERO}
TENSORS = {
    "flux": {"double_blocks.0.img_attn.qkv.weight": ZERO, "guidance_in.in_layer.weight": ZERO},
    "qwen": {"transformer_blocks.0.img_mod.1.weight": ZERO},
    "lora": {"lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": ZERO},
    "ours": {"connector.S.x": ZERO, "transformer_blocks.0.attn.to_q.weight": ZERO},
    "mllm": {"model.layers.0.mlp.up_proj.weight": ZERO},
    "none": {"a": ZERO, "b": ZERO},
    "v1p2": CONNECTOR | {"text_token_mapping.weight": ZERO},
    "v1.0": CONNECTOR | {"connector.scale_factor": ZERO},
    "v1.1": CONNECTOR,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a picture, and a file of each family."""
    from PIL import Image

    Image.new("RGB", (64, 48)).save(tmp_path / "in.png")
    for name, tensors in TENSORS.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path


@pytest.fixture
def say(here, monkeypatch, capsys):
    def said(*command):
        monkeypatch.chdir(here)
        before = files_of(here)
        code = cli.run(command)
        captured = capsys.readouterr()
        assert files_of(here) == before
        return code, captured.out, captured.err

    return said


def edit(model):
    return ["edit", "in.png", "a", "-o", "out.png", "--model", str(model)]


def rest_of_release(folder):
    save_file({"encoder.x": ZERO}, folder / "vae.safetensors")
    mllm = folder / "Qwen2.5-VL-7B-Instruct"
    mllm.mkdir()
    (mllm / "config.json").write_text("{}")
    save_file(TENSORS["mllm"], mllm / "model.safetensors")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("flux.safetensors", "is a FLUX transformer without the connector"),
        ("qwen.safetensors", "is a Qwen-Image transformer"),
        ("lora.safetensors", "is a LoRA"),
        ("ours.safetensors", "folder that holds model_index.json"),
        ("mllm.safetensors", "is a language model"),
        ("none.safetensors", r"its tensors are a, b"),
        ("gone.safetensors", "no such model file"),
        ("folder/gone.safetensors", "no such model file"),
    ],
)
def test_files_that_are_no_model(say, model, says):
    code, out, err = say(*edit(model))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert says in err
    assert model in err


def test_transformer_alone_says_what_is_missing_and_how_to_get_it(say, here):
    code, _, err = say(*edit("v1.1.safetensors"))
    assert code == 2
    assert len(err.splitlines()) == 1
    for word in (
        "vae.safetensors", "Qwen2.5-VL-7B-Instruct", "beside it",
        "hf download stepfun-ai/Step1X-Edit vae.safetensors",
        "hf download Qwen/Qwen2.5-VL-7B-Instruct",
    ):  # fmt: skip
        assert word in err
    rest_of_release(here)
    (here / "vae.safetensors").unlink()
    code, _, err = say(*edit("v1.1.safetensors"))
    assert "needs vae.safetensors beside it" in err
    assert "hf download Qwen" not in err


def test_v1p2_is_refused_and_shown(say, here):
    rest_of_release(here)
    code, out, err = say(*edit("v1p2.safetensors"))
    assert (code, out) == (2, "")
    assert err == (
        "step1x: v1p2.safetensors is a v1p2 model, which cannot be run yet: give a v1.0 or v1.1 "
        "model\n"
    )
    code, out, _ = say("models", "show", "v1p2.safetensors")
    assert code == 0
    assert "official layout, release v1p2, which cannot be run yet" in out


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("FluxPipeline", "holds a FluxPipeline, not a Step1XEditPipeline"),
        ("QwenImageEditPipeline", "holds a QwenImageEditPipeline"),
        ("Step1XEditPipelineV1P2", "is a v1p2 model"),
    ],
)
def test_folders_of_other_families(say, here, family, says):
    (here / "other").mkdir()
    (here / "other" / "model_index.json").write_text(json.dumps({"_class_name": family}))
    code, out, err = say(*edit("other"))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert says in err


def diffusers_folder(folder):
    """A model folder as far as headers go, 4 kB."""
    index = {"_class_name": "Step1XEditPipeline"}
    for name in ("transformer", "text_encoder", "vae"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        values = {f"{TENSOR[name]}.{i}": np.full(200, i, np.float16) for i in range(3)}
        save_file(values, folder / name / "model.safetensors")
        index[name] = ["library", "Class"]
    (folder / "model_index.json").write_text(json.dumps(index))
    instruction = {"num_dropped_tokens": 1, "max_length": 9, "min_pixels": 1, "max_pixels": 1}
    (folder / "instruction.json").write_text(json.dumps(instruction))
    return folder


TENSOR = {"transformer": "connector.S", "text_encoder": "model.layers", "vae": "encoder"}


def test_diffusers_folder_with_the_transformer_of_another_model(say, here):
    file = diffusers_folder(here / "model") / "transformer" / "model.safetensors"
    save_file(TENSORS["flux"], file)
    code, _, err = say(*edit("model"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "transformer is a FLUX transformer" in err
    save_file(TENSORS["v1p2"], file)
    code, _, err = say(*edit("model"))
    assert (code, err.count("\n")) == (2, 1)
    assert "is a v1p2 model" in err


@pytest.mark.parametrize("part", ["v1.1.safetensors", "vae.safetensors"])
def test_half_written_files_are_named(here, part):
    rest_of_release(here)
    whole = (here / part).read_bytes()
    (here / part).write_bytes(whole[: len(whole) - 2])
    refused(here, edit("v1.1.safetensors"), f"{part} cannot be read .*get it again")


def test_lost_shard_is_named(say, here):
    rest_of_release(here)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    mllm = here / "Qwen2.5-VL-7B-Instruct"
    (mllm / "model.safetensors.index.json").write_text(json.dumps(index))
    code, _, err = say(*edit("v1.1.safetensors"))
    assert code == 2
    assert "lacks 1 of 2 files, first model-2.safetensors" in err


def test_folder_with_several_models_asks_which(say, here):
    code, _, err = say(*edit("."))
    assert code == 2
    assert "several models: give the path of one of v1.0.safetensors, v1.1.safetensors" in err


@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
def test_show_tells_version_layout_and_dtype(say, here, version):
    folder = here / "release"
    folder.mkdir()
    file = folder / V1P1
    save_file(TENSORS[version], file)
    code, out, _ = say("models", "show", "release")
    assert code == 0
    assert f"official layout, release {version}; by itself 28 steps, guidance 6" in out
    assert "cannot be loaded: " in out
    rest_of_release(folder)
    code, out, _ = say("models", "show", f"release/{V1P1}")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert rows["transformer"].split()[-5:-2] == [
        f"{len(TENSORS[version])}",
        f"{2 * len(TENSORS[version])}",
        "F16",
    ]
    assert "AutoencoderKL" in rows["vae"]
    assert "cannot" not in out


def test_show_tells_fp8(say, here, tmp_path):
    rest_of_release(here)
    header = {
        "connector.S.x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]},
        "double_blocks.0.x": {"dtype": "BF16", "shape": [1], "data_offsets": [2, 4]},
    }
    text = json.dumps(header).encode()
    (here / "fp8.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    code, out, _ = say("models", "show", "fp8.safetensors")
    assert code == 0
    assert "BF16 F8_E4M3" in out


def test_list_and_show_of_what_is_not_here(say):
    code, out, _ = say("models", "list")
    assert code == 0
    for name, entry in CATALOG.items():
        assert any(line.split()[:2] == [name, entry.size.split()[0]] for line in out.splitlines())
    code, out, _ = say("models", "show", "v1.0-fp8")
    assert code == 0
    assert "`step1x models pull v1.0-fp8` fetches it from meimeilook/Step1X-Edit-FP8" in out


def test_pull_of_what_needs_none(say):
    assert say("models", "pull", "mini")[:2] == (
        0, "mini ships with the package: nothing is to be fetched\n",
    )  # fmt: skip
    code, _, err = say("models", "pull", "v1.0", "--from", "elsewhere")
    assert code == 2
    assert "'elsewhere', the choices are huggingface, modelscope" in err


def test_pull_through_the_installed_command(here, tmp_path_factory):
    """The connection breaks in the middle of a file; later a byte arrives changed."""
    published = files_of(diffusers_folder(tmp_path_factory.mktemp("published") / "model"))
    content = {f"some/body/{name}": data for name, data in published.items()}
    content["some/body/README.md"] = b"not wanted"
    chosen = "some/body/transformer/model.safetensors"
    half = len(content[chosen]) // 2
    place = here / "cache" / "step1x-edit" / "models" / "some--body"
    with serving(Site(content, break_after=[half], break_in=chosen)) as site:
        say = {"HF_ENDPOINT": site.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = run(here, ["models", "pull", "some/body"], **say)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert f"{len(content) - 1} files" in lines[0]
        assert lines[-1] == "some/body is complete and checked"
        assert (chosen, f"bytes={half}-") in site.requests
        fetched = {k: v for k, v in files_of(place).items() if k != "files.json"}
        assert fetched == {k[10:]: v for k, v in content.items() if not k.endswith(".md")}

        asked = len(site.requests)
        (place / chosen[10:]).unlink()
        site.flip = {chosen}
        done = run(here, ["models", "pull", "some/body"], **say)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert f"{chosen[10:]} is damaged: its SHA-256 is" in done.stderr
        site.flip = set()
        assert run(here, ["models", "pull", "some/body", "-q"], **say).stdout == ""
        assert {name for name, _ in site.requests[asked:]} == {chosen}
    done = run(here, ["models", "show", "some/body"])
    assert done.returncode == 0, done.stderr
    assert "diffusers layout, release v1.1" in done.stdout


@pytest.mark.slow
def test_edit_fetches_what_is_not_here_and_offline_does_not(here, tiny_model):
    content = {f"some/body/{name}": data for name, data in files_of(tiny_model).items()}
    with serving(Site(content)) as site:
        done = run(here, [*edit("some/body"), "--offline"], HF_ENDPOINT=site.url)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert "'some/body' is not here, and --offline" in done.stderr
        assert (site.requests, site.listings) == ([], 0)
        done = run(here, edit("some/body"), HF_ENDPOINT=site.url)
        assert done.returncode == 0, done.stderr
        assert "some/body from huggingface: " in done.stderr
        assert site.requests
    done = run(here, [*edit("some/body"), "--offline"], HF_ENDPOINT=site.url)
    assert done.returncode == 0, done.stderr
