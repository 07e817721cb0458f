"""Plans and their carrying out, from ModelScope; Hugging Face stands in `apps/test_pull`."""

from __future__ import annotations

import pytest
from filelock import FileLock

from step1x_edit.checkpoints import download as downloading
from step1x_edit.checkpoints import hub, resolve, store
from step1x_edit.errors import CheckpointError, InvalidRequest, Step1XEditError

from ..file_server import Site, serving

MLLM = "Qwen/Qwen2.5-VL-7B-Instruct"
FILES = {
    "stepfun-ai/Step1X-Edit/step1x-edit-i1258.safetensors": b"transformer" * 1000,
    "stepfun-ai/Step1X-Edit/step1x-edit-v1p1-official.safetensors": b"other" * 1000,
    "stepfun-ai/Step1X-Edit/vae.safetensors": b"vae" * 1000,
    "stepfun-ai/Step1X-Edit/README.md": b"words",
    f"{MLLM}/config.json": b"{}",
    f"{MLLM}/model-00001-of-00001.safetensors": b"mllm" * 5000,
    "someone/else/flux.safetensors": b"flux",
}
WANTED = [
    "step1x-edit-i1258.safetensors",
    "vae.safetensors",
    "config.json",
    "model-00001-of-00001.safetensors",
]


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(downloading, "PAUSE_S", 0.0)
    with serving(Site(dict(FILES))) as served:
        monkeypatch.setattr(hub, "MODELSCOPE_URL", served.url)
        yield served


def test_a_plan_names_what_a_model_needs_and_nothing_else(site):
    plan = hub.plan("v1.0", "modelscope")
    assert [item.remote.path for item in plan.items] == WANTED
    assert plan.num_bytes == plan.missing_bytes == 11_000 + 3000 + 2 + 20_000
    assert site.requests == []
    assert resolve.find("v1.0") is None


def test_fetching_and_checking_again(site):
    plan = hub.plan("v1.0", "modelscope")
    seen, files = [], []
    hub.fetch(plan, on_bytes=lambda *now: seen.append(now), on_file=lambda *f: files.append(f))
    assert seen[-1] == (plan.num_bytes, plan.num_bytes)
    assert dict(files) == dict.fromkeys(WANTED, "fetched")
    assert (plan.missing, plan.missing_bytes) == ((), 0)
    found = resolve.find("v1.0")
    assert found is not None
    assert found.components["transformer"].read_bytes() == b"transformer" * 1000
    assert found.components["text_encoder"] == store.place_of(MLLM)

    # Nothing is fetched twice, and a byte that went wrong on the disk is found and mended.
    asked = len(site.requests)
    files.clear()
    hub.fetch(plan, verify=True, on_file=lambda *f: files.append(f))
    assert (dict(files), len(site.requests)) == (dict.fromkeys(WANTED, "is right"), asked)
    spoilt = found.components["vae"]
    spoilt.write_bytes(b"v" + b"\0" + spoilt.read_bytes()[2:])
    files.clear()
    hub.fetch(plan, verify=True, on_file=lambda *f: files.append(f))
    assert dict(files)["vae.safetensors"] == "was damaged, fetched again"
    assert spoilt.read_bytes() == b"vae" * 1000

    # Another model of the same repository shares the rest.
    other = hub.plan("v1.1-official", "modelscope")
    assert [i.remote.path for i in other.missing] == ["step1x-edit-v1p1-official.safetensors"]


def test_what_broke_off_is_not_a_model_and_counts_as_begun(site, monkeypatch):
    site.break_after = [4000]
    monkeypatch.setattr(downloading, "ATTEMPTS", 1)
    plan = hub.plan("v1.0", "modelscope")
    with pytest.raises(Step1XEditError, match="goes on from there"):
        hub.fetch(plan)
    assert resolve.find("v1.0") is None
    assert plan.missing_bytes <= plan.num_bytes - 4000
    hub.fetch(plan)
    assert "bytes=4000-" in [asked for _, asked in site.requests]
    assert resolve.find("v1.0") is not None


def test_a_spoilt_file_is_named(site):
    site.flip = {"stepfun-ai/Step1X-Edit/vae.safetensors"}
    with pytest.raises(CheckpointError, match=r"vae\.safetensors is damaged"):
        hub.fetch(hub.plan("v1.0", "modelscope"))
    assert resolve.find("v1.0") is None


def test_what_cannot_be_fetched(site, monkeypatch, tmp_path):
    with pytest.raises(InvalidRequest, match=r"not in the diffusers layout .*v1\.0"):
        hub.plan("someone/else", "modelscope")
    with pytest.raises(Step1XEditError, match="HTTP 404"):
        hub.plan("no/body", "modelscope")
    with pytest.raises(InvalidRequest, match="on this machine already"):
        hub.plan(str(tmp_path))
    plan = hub.plan("v1.0", "modelscope")
    lock = store.place_of(MLLM).with_name("Qwen--Qwen2.5-VL-7B-Instruct.lock")
    lock.parent.mkdir(parents=True)
    busy = pytest.raises(Step1XEditError, match="another process is fetching Qwen")
    with FileLock(lock), busy:
        hub.fetch(plan)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 10}))
    with pytest.raises(Step1XEditError, match=r"takes 34,002 bytes .* has 10 free"):
        hub.fetch(plan)


@pytest.mark.parametrize("path", ["../evil.json", "/evil.json", "a/../../evil.json"])
def test_files_that_lead_out_of_the_folder_are_refused(site, path):
    site.files[f"{MLLM}/{path}"] = b"{}"
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        hub.plan("v1.0", "modelscope")
