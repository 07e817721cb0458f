"""``python -m step1x_edit.training CONFIG.yaml``: begin or go on with a training run."""

import argparse
import logging
from pathlib import Path

from step1x_edit.training.config import AutoencoderRun, ReadingRun, load


def main() -> None:
    """Read the configuration and run what its ``kind`` says."""
    parser = argparse.ArgumentParser(prog="python -m step1x_edit.training", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML file, see configs/train")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = load(parser.parse_args().config)
    if isinstance(config, AutoencoderRun):
        from step1x_edit.training import autoencoder

        autoencoder.train(config)
    elif isinstance(config, ReadingRun):
        from step1x_edit.training import reading

        reading.train(config)
    else:
        from step1x_edit.training import trainer

        trainer.train(config)


if __name__ == "__main__":
    main()
