"""Ctrl-C while the command line is still being imported: quiet, and exit 130."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What pip writes into the console script.
SCRIPT = "import sys\nfrom step1x_edit.apps.start import main\nsys.exit(main())"


def test_the_console_script_starts_there():
    assert 'step1x = "step1x_edit.apps.start:main"' in (ROOT / "pyproject.toml").read_text()


def start(folder, **options):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "models", "list"], cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_an_interrupted_import(tmp_path):
    """A module of ours that is interrupted in the place of a library's."""
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    process = start(tmp_path)  # python -c looks for modules here first
    assert process.communicate(timeout=300) == ("", "step1x: interrupted\n")
    assert process.returncode == 130


def test_a_real_signal(tmp_path):
    process = start(
        tmp_path,
        # A shell that runs the tests in its background has Ctrl-C ignored in all its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "_pydantic_core" not in maps.read_text():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "")
    assert len(err.splitlines()) == 1, err
    assert "interrupted" in err
