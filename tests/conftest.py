"""Shapes and types of every call are checked under pytest, and only there."""

import sys
from types import ModuleType

import pytest
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception
from jaxtyping import install_import_hook

# An int may stand for a float, as in PEP 484.
decorate = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """Beartype, but for methods that give back `Self`, which it only checks on whole classes."""
    try:
        return decorate(function)
    except BeartypeDecorHintPep673Exception:
        return function


# The hook takes the checker by its dotted name.
checker = ModuleType("checker_under_pytest")
checker.check = check
sys.modules[checker.__name__] = checker
install_import_hook("step1x_edit", f"{checker.__name__}.check")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A complete model folder of tiny random networks; copy it before changing it."""
    from .tiny_model import write_tiny_model  # after the hook, as it imports the package

    return write_tiny_model(tmp_path_factory.mktemp("model"))
