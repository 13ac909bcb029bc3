"""A resumed run goes on with its own settings: learning rate, weight decay and β are not those of the checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_OF_THE_RUN = ("weight_decay", "betas", "eps", "initial_lr")


@contextmanager
def keep_settings(optimizer: torch.optim.Optimizer, scheduler: Any) -> Iterator[None]:
    """Gives optimiser and schedule this run's settings back after the block has loaded a checkpoint's state.

    Where the settings are the checkpoint's, what was loaded stays as it is, to the bit. A changed learning rate keeps
    its place in the schedule.

    Args:
        optimizer: With the settings of this run when the block begins.
        scheduler: Its learning-rate schedule.
    """
    own = [{name: group[name] for name in _OF_THE_RUN if name in group} for group in optimizer.param_groups]
    base_rates = list(getattr(scheduler, "base_lrs", []))
    yield
    if base_rates:
        scheduler.base_lrs = base_rates
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        before = group.get("initial_lr")
        group.update(settings)
        if before and group["initial_lr"] != before:
            group["lr"] *= group["initial_lr"] / before
