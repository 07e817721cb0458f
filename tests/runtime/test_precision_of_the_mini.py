"""`perf/precision.py` on the shipped model, against the bounds that the documentation states."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rows_of(file: Path) -> dict[str, list[str]]:
    """First cell → the others, of a Markdown file's rows about precisions."""
    cells = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    return {first: rest for first, *rest in cells if len(rest) >= 4}


@pytest.mark.slow
def test_the_worst_velocity_stays_within_the_stated_bound(tmp_path):
    command = [sys.executable, ROOT / "perf" / "precision.py", "--out", tmp_path / "made.md"]
    subprocess.run(command, check=True, capture_output=True)
    stated, measured = rows_of(ROOT / "docs" / "runtime.md"), rows_of(tmp_path / "made.md")
    for weights in ("fp8", "int8", "int4"):
        assert 0 < float(measured[weights][1]) <= float(stated[weights][4]), weights
