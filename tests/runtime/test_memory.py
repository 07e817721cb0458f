"""Memory foretold: against real tensors on the tiny folder, and what is said when it runs out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from step1x_edit.apps import cli
from step1x_edit.apps.fitting import BESIDE, choose
from step1x_edit.checkpoints.catalog import CATALOG
from step1x_edit.checkpoints.resolve import look
from step1x_edit.errors import InvalidRequest, OutOfMemory
from step1x_edit.model.inputs import Row
from step1x_edit.model.latents import draw_noise
from step1x_edit.request import RuntimeConfig
from step1x_edit.runtime import memory, shortage
from step1x_edit.runtime.blueprint import blueprint
from step1x_edit.runtime.memory import estimate
from step1x_edit.runtime.offload import park_head, stream_from_memory
from step1x_edit.runtime.peak import PeakTracker

from .loading import load

SIZE = 128
SCRIPT = Path(__file__).parents[2] / "perf" / "memory.py"


def foretell(folder: Path, kind: str, **settings):
    """(weights, offload, step cache) → estimate."""
    wanted = {"size_level_px": SIZE, "guidance": 2.0, "dtype": torch.float32} | settings
    found = estimate(blueprint(str(folder), look(folder)), kind=kind, **wanted)
    return {(each.weights, each.offload, each.step_cache): each for each in found}


def bytes_of(module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@pytest.fixture(scope="module")
def on_gpu(tiny_model):
    return foretell(tiny_model, "cuda", weights=["auto", "int4"])


def test_weights_are_counted_as_the_runtime_holds_them(tiny_model, on_gpu):
    for weights in ("auto", "int4"):
        pipeline, _ = load(tiny_model, weights=weights)
        networks = [bytes_of(getattr(pipeline, n)) for n in ("text_encoder", "transformer", "vae")]
        whole, parts = on_gpu[weights, "none", False], on_gpu[weights, "model", False]
        assert whole.stages["decoding"] - parts.stages["decoding"] == sum(networks[:2])
        assert parts.stages["steps"] - whole.stages["steps"] == -networks[0]
        assert parts.main_memory == sum(networks)
        assert whole.main_memory == 0


def peaks_of_real_tensors(pipeline) -> dict[str, int]:
    """Stage → peak beside the weights, of a real run."""
    noise = draw_noise((1, 16, SIZE // 8, SIZE // 8), None)
    rows = [Row(Image.new("RGB", (SIZE, SIZE)), "make it red", "", (SIZE, SIZE), noise)]

    def peak_of(run):
        tracker = PeakTracker()
        for network in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
            for tensor in (*network.parameters(), *network.buffers()):
                tracker.know(tensor)
        with torch.no_grad(), tracker:
            made = run()
        return made, tracker.peak

    reference, picture = peak_of(lambda: pipeline.encode_references(rows))
    with torch.no_grad():
        features = pipeline.encode_instructions(rows, True)
    made, steps = peak_of(lambda: pipeline.denoise(rows, features, reference, 1, 2.0, None))
    _, decoding = peak_of(lambda: pipeline.decode([made[0]], rows, "pt"))
    return {"picture": picture, "steps": steps, "decoding": decoding}


@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_activations_are_those_of_a_real_run(tiny_model, on_gpu, weights):
    pipeline, _ = load(tiny_model, weights=weights)
    networks = sum(map(bytes_of, (pipeline.text_encoder, pipeline.transformer, pipeline.vae)))
    for stage, real in peaks_of_real_tensors(pipeline).items():
        foretold = on_gpu[weights, "none", False].stages[stage] - networks
        assert foretold == pytest.approx(real, rel=0.05), stage


def test_streamed_blocks_are_those_of_a_real_run(tiny_model, on_gpu):
    """Streamed from main memory, whose copies the tracker sees where they are made at once."""
    pipeline, _ = load(tiny_model)
    transformer = pipeline.transformer
    stream = stream_from_memory(transformer, torch.device("cpu"))
    stream._reader = memory.AtOnce()
    read = stream._read
    stream._read = lambda block: {p: weight.clone() for p, weight in read(block).items()}
    real = peaks_of_real_tensors(pipeline)["steps"]
    kept = sum(
        part.nbytes for part in transformer.parameters() if part.stride() != (0,) * part.ndim
    )
    vae = bytes_of(pipeline.vae)
    foretold = on_gpu["auto", "disk", False].stages["steps"]
    rows_and_head = ("embed_tokens", "lm_head")
    text = [n for n, _ in pipeline.text_encoder.named_parameters() if "blocks." not in n]
    outside = [n for n in text if ".layers." not in n and not any(r in n for r in rows_and_head)]
    language = sum(pipeline.text_encoder.get_parameter(name).nbytes for name in outside)
    assert foretold - kept - vae - language == pytest.approx(real, rel=0.05)


def test_what_waits_elsewhere_takes_less(on_gpu):
    for weights in ("auto", "int4"):
        ways = {each: on_gpu[weights, each, False].peak for each in memory.OFFLOADS["cuda"]}
        # Which of them least depends on the sizes: here most of it is no block.
        assert max(ways["model"], ways["block"], ways["disk"]) < ways["none"]
    for offload in memory.OFFLOADS["cuda"]:
        plain, cached = (on_gpu["auto", offload, on].stages for on in (False, True))
        tokens = 2 * (SIZE // 16) ** 2
        assert cached["steps"] - plain["steps"] == memory.NUM_CACHED * 2 * tokens * 32 * 4
        assert cached["decoding"] == plain["decoding"]


def test_a_cpu_has_no_memory_beside_main_memory(tiny_model):
    found = foretell(tiny_model, "cpu", weights=["auto"], guidance=-1.0)
    assert {offload for _, offload, _ in found} == {"none", "block", "disk"}
    guided = foretell(tiny_model, "cpu", weights=["auto"])
    one, two = (each["auto", "none", False].stages["steps"] for each in (found, guided))
    assert one < two


@pytest.fixture(scope="module")
def released():
    """v1.1 of full size at 1024, of which no file is here."""
    found = estimate(
        blueprint("v1.1", None), size_level_px=1024, guidance=6.0, dtype=torch.bfloat16,
        kind="cuda", weights=["auto", "fp8"],
    )  # fmt: skip
    return {(each.weights, each.offload): each for each in found if each.step_cache}


@pytest.mark.slow
def test_the_release_stays_below_its_published_peaks(released):
    published = {
        ("auto", "none"): 49.8, ("fp8", "none"): 34, ("auto", "model"): 29.1, ("fp8", "model"): 18,
        ("auto", "disk"): 12,
    }  # fmt: skip
    for setting, limit in published.items():
        assert 0.05 * limit < released[setting].peak / 1e9 <= limit, setting


@pytest.mark.slow
@pytest.mark.parametrize(
    ("free_gb", "main_gb", "setting"),
    [
        (80, 64, ("auto", "none")),
        (40, 64, ("auto", "model")),
        (40, 16, ("auto", "disk")),
        (2, 64, None),
    ],
)
def test_the_first_setting_that_fits_is_recommended(released, free_gb, main_gb, setting):
    chosen = choose(list(released.values()), free_gb * 1e9, main_gb * 1e9)
    assert chosen is None  # with the step cache on, which is off by default
    plain = [memory.Estimate(*k, False, e.stages, e.main_memory) for k, e in released.items()]
    chosen = choose(plain, free_gb * 1e9, main_gb * 1e9)
    assert (chosen and (chosen.weights, chosen.offload)) == setting
    assert chosen is None or chosen.peak + BESIDE <= free_gb * 1e9


def test_doctor_prints_the_table_and_recommends(tiny_model, capsys):
    words = ["doctor", "--model", str(tiny_model), "--size-level", str(SIZE)]
    assert cli.run(words) == 0
    head, columns, *rows, _, _, advice = capsys.readouterr().out.splitlines()
    assert f"size level {SIZE}, guidance 2, float32" in head
    assert columns.split()[:4] == ["weights", "offload", "peak", "while"]
    assert len(rows) == 4 * 3
    assert f"--size-level {SIZE} --weights auto --offload none: it takes" in advice


def test_models_that_are_not_here(tmp_path, monkeypatch):
    with pytest.raises(InvalidRequest, match="some/model is not on this machine"):
        blueprint("some/model", None)
    plan = blueprint("v1.0-fp8", None)
    dtypes = {name: {p.dtype for p in n.places.values()} for name, n in plan.networks().items()}
    assert torch.float8_e4m3fn in dtypes["transformer"]
    assert dtypes["text_encoder"] == {torch.bfloat16}
    assert blueprint(CATALOG["v1.1"].location, None).size_level_px == 512


def test_a_parked_head_answers_when_it_is_asked_after_all():
    head, rows = torch.nn.Linear(4, 6, bias=False), torch.nn.Embedding(6, 4)
    model = SimpleNamespace(lm_head=head, get_input_embeddings=lambda: rows)
    wanted = head(torch.ones(1, 4))
    park_head(model)
    assert torch.equal(head(torch.ones(1, 4)), wanted)
    assert len(head._forward_pre_hooks) == 1
    tied = torch.nn.Linear(4, 6, bias=False)
    tied.weight = rows.weight
    park_head(SimpleNamespace(lm_head=tied, get_input_embeddings=lambda: rows))
    assert not tied._forward_pre_hooks  # its weight is at work as the embedding


@pytest.mark.parametrize(
    ("settings", "on_gpu", "says"),
    [
        ({}, True, ["--weights int8"]),
        ({"weights": "fp8"}, True, ["--offload model"]),
        ({"weights": "int8", "offload": "model"}, True, ["--offload block"]),
        ({"weights": "int8", "offload": "disk"}, True, ["--weights int4"]),
        ({"weights": "int4", "offload": "disk"}, True, []),
        ({"weights": "int8"}, False, ["--offload block"]),
        ({"weights": "int8", "offload": "block"}, False, ["--offload disk"]),
        ({"weights": "int8", "offload": "disk"}, False, ["--dtype bfloat16"]),
    ],
)
def test_the_next_smaller_setting(settings, on_gpu, says):
    runtime = RuntimeConfig.checked(**settings)
    assert shortage.next_smaller(runtime, has_own_memory=on_gpu) == says


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    ],
)
def test_every_shortage_is_named(error):
    with pytest.raises(OutOfMemory, match="--weights int8 or a --size-level below 512"):  # noqa: SIM117
        with shortage.named(RuntimeConfig.checked(), 512):
            raise error
    with pytest.raises(RuntimeError, match="shape"), shortage.named(RuntimeConfig.checked()):
        raise RuntimeError("shape '[2]' is invalid")


OVERSTRAINED = """
import resource, sys
from pathlib import Path
from step1x_edit import Editor
from step1x_edit.apps import cli
from step1x_edit.apps.console import quieten

quieten()
Editor.load(sys.argv[1])  # the libraries are there, and their threads
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 100_000_000, resource.RLIM_INFINITY))
sys.exit(cli.run(["edit", "in.png", "make it red", "-o", "out.png", "--model", sys.argv[1],
                  "--size-level", "2048", "--weights", "int8"]))
"""


@pytest.mark.slow
def test_a_real_shortage_is_one_line(tiny_model, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    done = subprocess.run(
        [sys.executable, "-c", OVERSTRAINED, str(tiny_model)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert "out of memory on cpu with --weights int8 --offload none: give --offload block" in line
    assert "or a --size-level below 2048" in line
    assert not (tmp_path / "out.png").exists()


@pytest.mark.slow
def test_foretold_and_measured_are_close():
    done = subprocess.run(
        [
            sys.executable, str(SCRIPT), "--only", "check",
            "--size-level", "64", "--ways", "fp8:none", "auto:disk",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    ratios = {(row[1].strip(), row[2].strip()): float(row[5]) for row in rows}
    assert set(ratios) == {("fp8", "none"), ("auto", "disk")}, done.stderr
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios.values()), ratios
