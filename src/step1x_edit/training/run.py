"""Begin or go on with a run of any kind. Called by ``step1x train`` and ``python -m``."""

import signal

from step1x_edit.training import ranks
from step1x_edit.training.checkpoint import alone
from step1x_edit.training.config import AnyRun, AutoencoderRun, EditRun, ReadingRun
from step1x_edit.training.loop import Stage, Watch


def train(config: AnyRun, stage: Stage, watch: Watch | None = None) -> signal.Signals | None:
    """Run what a configuration's ``kind`` says.

    Args:
        config: The run.
        stage: Shows what is going on before the first step.
        watch: Sees each step.

    Returns:
        The signal that stopped the run; None when it is complete.

    Raises:
        InvalidRequest: The run is going on already, or a setting cannot be used, or not by several
            processes.
        Step1XEditError: As of the kind's own ``train``.
    """
    if not isinstance(config, AutoencoderRun | ReadingRun | EditRun):
        from step1x_edit.training import tuning

        return tuning.train(config, stage=stage, watch=watch)
    ranks.refuse_several(f"a run of kind {config.kind} trains", "start it without torchrun")
    with alone(config.folder):
        return _train_mini(config, watch)


def _train_mini(
    config: AutoencoderRun | ReadingRun | EditRun, watch: Watch | None
) -> signal.Signals | None:
    if isinstance(config, AutoencoderRun):
        from step1x_edit.training import autoencoder

        return autoencoder.train(config, watch)
    if isinstance(config, ReadingRun):
        from step1x_edit.training import reading

        return reading.train(config, watch)
    from step1x_edit.training import trainer

    return trainer.train(config, watch)
