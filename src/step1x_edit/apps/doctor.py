"""`step1x doctor`: what this machine is, and which model it can run."""

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from step1x_edit.apps import checks
from step1x_edit.apps.columns import columns, megabytes
from step1x_edit.checkpoints.catalog import CATALOG, DEFAULT_MODEL
from step1x_edit.errors import CheckpointError

DISTRIBUTION = "step1x-edit"
RELEASED_BYTES = 42e9
"""Memory that the released weights take as they are; less needs offloading or smaller weights."""


@dataclass(frozen=True)
class Report:
    """Lines to print, and whether the shipped model can run."""

    lines: list[str]
    healthy: bool


class Machine(NamedTuple):
    """What there is to run on; sizes in bytes, 0 where unknown."""

    cores: int
    memory: int
    disk: int
    gpu: str
    gpu_memory: int


def examine() -> Report:
    """Look at Python, packages, machine and the shipped model."""
    machine = look_at_machine()
    packages, wrong = _packages()
    mini = _mini_problem()
    rows = [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("packages", packages),
        ("cores", f"{machine.cores}, torch uses {torch.get_num_threads()}"),
        ("memory", megabytes(machine.memory) if machine.memory else "unknown"),
        ("gpu", f"{machine.gpu}, {megabytes(machine.gpu_memory)}" if machine.gpu else "none"),
        ("disk", f"{megabytes(machine.disk)} free at {Path.cwd()}"),
        ("mini", mini or "complete"),
        *(("problem", problem) for problem in wrong),
    ]
    healthy = mini is None and not wrong
    advice = recommend(machine) if healthy else "mend what is named above, then run this again"
    more = "`step1x doctor --model NAME --size-level 1024` tells what each setting would take."
    return Report([*columns(rows), "", advice, more], healthy)


def recommend(machine: Machine) -> str:
    """Which model to use here, in a sentence or two."""
    released = next(name for name in CATALOG if name != DEFAULT_MODEL)
    enough = max(machine.memory, machine.gpu_memory) >= RELEASED_BYTES
    if machine.gpu and enough:
        return f"Use --model {released}: it fits. {DEFAULT_MODEL}, the default, is for trying out."
    missing = "no GPU" if not machine.gpu else "less memory than its weights"
    return (
        f"Use {DEFAULT_MODEL}, the default: it needs about 1 GB of memory. {released} takes "
        f"{megabytes(int(RELEASED_BYTES))}, and here is {missing}."
    )


def look_at_machine() -> Machine:
    """Cores, memory, disk and GPU of this machine."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a Unix
        memory = 0
    gpu, gpu_memory = "", 0
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu, gpu_memory = properties.name, properties.total_memory
    elif torch.backends.mps.is_available():
        gpu, gpu_memory = "Apple GPU (mps)", memory
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(cores or 1, memory, shutil.disk_usage(Path.cwd()).free, gpu, gpu_memory)


def _packages() -> tuple[str, list[str]]:
    """The versions of what this package requires, and what is wrong with them."""
    versions, wrong = [], []
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed: pip install '{requirement}'")
            continue
        versions.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    return f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}; {', '.join(versions)}", wrong


def _mini_problem() -> str | None:
    """What is wrong with the shipped model, if anything."""
    try:
        checks.check_model(DEFAULT_MODEL)
    except CheckpointError as error:
        return str(error)
    return None
