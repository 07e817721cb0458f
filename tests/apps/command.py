"""Running the installed command, and what a refusal has to look like."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

STEP1X = Path(sys.executable).parent / "step1x"


def run(folder: Path, command: Sequence[str], **environment: str) -> subprocess.CompletedProcess:
    """Run `step1x` in a folder."""
    return subprocess.run(
        [str(STEP1X), *command], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | environment, timeout=600,
    )  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(folder: Path, command: Sequence[str], *says: str) -> str:
    """Assert that a command is refused in one line that says all of `says`, and changes no file."""
    before = files_of(folder)
    done = run(folder, command)
    assert done.returncode == 2, f"exit {done.returncode}: {done.stdout}{done.stderr}"
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    for pattern in says:
        assert re.search(pattern, lines[0]), f"{pattern!r} is not in: {lines[0]}"
    assert files_of(folder) == before
    return lines[0]
