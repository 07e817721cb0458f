"""What a figure was measured on."""

import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch


def describe() -> dict[str, str]:
    """Processor, cores, library versions, commit and day."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
    }
