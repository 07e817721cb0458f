"""Shapes and types of every call are checked under pytest, and only there."""

import sys
from types import ModuleType

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# The hook takes the checker by its dotted name; ours lets an int stand for a float (PEP 484).
checker = ModuleType("beartype_with_numeric_tower")
checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[checker.__name__] = checker
install_import_hook("step1x_edit", f"{checker.__name__}.check")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A complete model folder of tiny random networks; copy it before changing it."""
    from .tiny_model import write_tiny_model  # after the hook: it imports the package

    return write_tiny_model(tmp_path_factory.mktemp("model"))
