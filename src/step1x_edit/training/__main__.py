"""``python -m step1x_edit.training CONFIG.yaml``: as ``step1x train``, with a plain log."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from step1x_edit.training import ranks
from step1x_edit.training.config import load
from step1x_edit.training.loop import Advance
from step1x_edit.training.run import train


@contextmanager
def _logged(what: str) -> Iterator[Advance]:
    logging.getLogger(__name__).info("%s", what)
    yield lambda *_: None


def main() -> None:
    """Read the configuration and run what its ``kind`` says."""
    parser = argparse.ArgumentParser(prog="python -m step1x_edit.training", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML file, see configs/train")
    path = parser.parse_args().config
    with ranks.joined():
        level = logging.INFO if ranks.is_first() else logging.ERROR
        logging.basicConfig(level=level, format="%(asctime)s %(message)s")
        train(load(path), _logged)


if __name__ == "__main__":
    main()
