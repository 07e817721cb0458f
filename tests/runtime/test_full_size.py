"""`perf/full_size.py` at tiny scale: the same code that measures the full-size model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "perf" / "full_size.py"


@pytest.mark.slow
def test_it_writes_edits_measures_and_cleans_up(tmp_path):
    command = [sys.executable, str(SCRIPT), "--scale", "tiny", "--size-level", "64"]
    (tmp_path / "models").mkdir()
    done = subprocess.run(
        [*command, "--folder", "models", "--out", "result.json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(done.stdout) == result
    assert list(result["offload"]) == ["disk", "block"]
    for run in result["offload"].values():
        assert 0.1 < run["peak_resident_gib"] < 2
        assert run["read_gib"] > 0
        assert run["edit_s"] >= run["waiting_for_the_disk_s"] > 0
    disk, block = (result["offload"][way] for way in ("disk", "block"))
    assert block["read_gib"] < disk["read_gib"]  # the language model alone
    assert list((tmp_path / "models").iterdir()) == []
