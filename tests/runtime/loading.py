"""A model folder as a pipeline that runs with the settings given."""

from pathlib import Path
from typing import Any

from step1x_edit.checkpoints.resolve import look
from step1x_edit.model.instruction_config import read_instruction
from step1x_edit.request import RuntimeConfig
from step1x_edit.runtime.apply import Loaded, load_pipeline


def load(folder: Path, **settings: Any) -> Loaded:
    return load_pipeline(look(folder), read_instruction(folder), RuntimeConfig.checked(**settings))
