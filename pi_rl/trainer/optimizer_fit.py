"""Whether a checkpoint's optimiser and schedule are of this run's parameters; found out before anything is loaded.

``Optimizer.load_state_dict`` compares numbers of parameters, but neither shapes nor names: what does not fit would
fail in the first update, with the checkpoint's weights loaded. Here a small optimiser and a schedule of the run's
kinds, made for the purpose, load the checkpoint's groups and make a step.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pi_rl.policies.weight_files import StoredTensor, some_of
from pi_rl.trainer.checkpoint_folders import CheckpointError
from pi_rl.trainer.plain_state import (
    OPTIMIZER_TENSORS,
    OPTIMIZER_VALUES,
    SCHEDULER_FILE,
    read_optimizer_layout,
    read_scheduler,
)

_REMEDY = (
    "Resume with the settings of that run, which its pi_rl_config.yaml has (lora_rank, train_vlm, critic, "
    "critic_hidden_sizes, noise, optim and lr_scheduler_type decide this), give another checkpoint, or start anew "
    "from the folder with model=."
)
_UNUSABLE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError)


def check_optimizer_fits(folder: Path, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """Refuses an optimiser's state of other parameters, or of another kind of optimiser; reads no tensors.

    States of optimisers that are not PyTorch's are compared in their groups only.

    Args:
        folder: A checkpoint.
        optimizer: This run's; it needs no state, and its parameters may be sharded.
        names: Of its parameters, for messages.

    Raises:
        CheckpointError: Naming group, parameter or entry, what is there and what this run has.
    """
    stored = read_optimizer_layout(folder)
    groups: list[dict[str, Any]] = optimizer.param_groups
    _check_groups(folder, stored["param_groups"], groups)
    kind: Any = type(getattr(optimizer, "optimizer", optimizer))  # within Accelerate's wrapper
    if not kind.__module__.startswith("torch.optim"):
        return
    index = 0
    for own, theirs in zip(groups, stored["param_groups"], strict=True):
        trials = {ndim: _trial(folder, kind, own, theirs, ndim) for ndim in {p.ndim for p in own["params"]}}
        for parameter in own["params"]:
            if index in stored["state"]:
                what = f"{names[parameter]} (parameter {index})"
                _check_state(folder, stored["state"][index], trials[parameter.ndim], parameter, what, kind.__name__)
            index += 1


def check_schedule_fits(
    folder: Path, groups: int, make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
) -> None:
    """Refuses a schedule's state that this run's kind of schedule cannot load.

    Args:
        folder: A checkpoint.
        groups: Number of the optimiser's groups.
        make: Makes such a schedule for an optimiser.

    Raises:
        CheckpointError: Naming the entry.
    """
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=1.0)
    schedule = make(optimizer)
    state = read_scheduler(folder)
    try:
        schedule.load_state_dict(state)
    except _UNUSABLE as error:
        raise CheckpointError(
            f"{folder / SCHEDULER_FILE} cannot be loaded into this run's {type(schedule).__name__} "
            f"({type(error).__name__}: {error}). {_REMEDY}"
        ) from error
    rates = state["_last_lr"]
    if len(rates) != groups or not all(isinstance(rate, int | float) for rate in rates):
        raise CheckpointError(
            f"{folder / SCHEDULER_FILE} has _last_lr={rates!r:.80}; this run's optimiser has {groups} groups, each "
            f"with a learning rate. {_REMEDY}"
        )


def _check_groups(folder: Path, stored: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    theirs, ours = (
        [f"{len(group['params'])} in {group.get('name', 'a group without a name')}" for group in some]
        for some in (stored, groups)
    )
    if theirs != ours:
        raise CheckpointError(
            f"{folder / OPTIMIZER_VALUES} is of other trained parameters than this run's: {', '.join(theirs)} there, "
            f"{', '.join(ours)} here. {_REMEDY}"
        )


def _trial(folder: Path, kind: Any, own: Mapping[str, Any], theirs: Mapping[str, Any], ndim: int) -> dict[str, Any]:
    """The state of a small parameter of so many dimensions after a step with the checkpoint's group."""
    parameter = nn.Parameter(torch.zeros((2,) * ndim))
    parameter.grad = torch.zeros_like(parameter)
    trial = kind([{**own, "params": [parameter]}])
    # a setting that is a tensor was not read; the run's own stands for it
    plain = {name: own.get(name) if isinstance(value, StoredTensor) else value for name, value in theirs.items()}
    try:
        # with the state that it has, if any: some kinds have theirs from the beginning
        trial.load_state_dict({**trial.state_dict(), "param_groups": [{**plain, "params": [0]}]})
        trial.step()
    except _UNUSABLE as error:
        raise CheckpointError(
            f"{folder / OPTIMIZER_VALUES} holds settings with which this run's {kind.__name__} cannot make a step "
            f"({type(error).__name__}: {error}). {_REMEDY}"
        ) from error
    return trial.state[parameter]


def _check_state(
    folder: Path, stored: Mapping[str, Any], trial: Mapping[str, Any], parameter: nn.Parameter, what: str, kind: str
) -> None:
    lacking = sorted(set(trial) - set(stored))
    if lacking:
        raise CheckpointError(
            f"{folder / OPTIMIZER_TENSORS} has {some_of(sorted(stored)) or 'nothing'} of {what}; this run's {kind} "
            f"needs {some_of(lacking)}. {_REMEDY}"
        )
    for name, value in trial.items():
        given = stored[name]
        if not isinstance(value, Tensor):
            continue
        if not isinstance(given, StoredTensor):
            if value.ndim == 0 and isinstance(given, int | float):
                continue
            raise CheckpointError(
                f"{folder / OPTIMIZER_VALUES} has {name}={given!r:.80} of {what}; this run's {kind} needs a tensor. "
                f"{_REMEDY}"
            )
        like_parameter = value.ndim > 0 and value.shape == (2,) * parameter.ndim
        expected = tuple(parameter.shape) if like_parameter else tuple(value.shape)
        if (like_parameter or value.ndim == 0) and given.shape != expected:
            raise CheckpointError(
                f"{folder / OPTIMIZER_TENSORS} has {name} of {what} with shape {given.shape}; this run needs "
                f"{expected}. {_REMEDY}"
            )
