"""Environments by name: `metaworld:reach-v3`, several tasks with commas, or all of them as `metaworld:mt50`."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pi_rl.envs.metaworld_options import MetaWorldOptions, make_spec, task_instructions
from pi_rl.envs.vector_env import EnvSpec, VectorEnv
from pi_rl.envs.workers import WorkerVectorEnv

SIMULATORS = ("metaworld",)
ALL_TASKS = {"metaworld": "mt50"}


def make_env(name: str, num_envs: int, num_workers: int | None = None, **options: Any) -> VectorEnv:
    """Makes a vector environment.

    Args:
        name: "SIMULATOR:TASK" or "SIMULATOR:TASK,TASK,…"; "metaworld:mt50" is all of MetaWorld's 50 tasks. Which of
            the tasks an environment runs is decided by the ids it is reset to.
        num_envs: Number B of environments, at least 1.
        num_workers: Worker processes; None means one per core, never more than `num_envs`.
        **options: Fields of the simulator's options, for MetaWorld `pi_rl.envs.metaworld_options.MetaWorldOptions`.

    Returns:
        The environment; close it, or use it in a `with` block.

    Raises:
        ValueError: Unknown simulator, task or option (the message lists the nearest names), or a bad value.
        RuntimeError: No off-screen renderer works; the message gives the command that installs one.
    """
    spec = check_name_and_options(name, options)
    simulator, _ = parse_name(name)
    return WorkerVectorEnv(spec, simulator, options, num_envs, num_workers)


def check_name_and_options(name: str, options: Mapping[str, Any]) -> EnvSpec:
    """The specification that an environment would have; starts nothing.

    Args:
        name: As for `make_env`.
        options: As for `make_env`.

    Raises:
        ValueError: As for `make_env`.
    """
    simulator, tasks = parse_name(name)
    fields = [field.name for field in dataclasses.fields(MetaWorldOptions)]
    for key in options:
        if key not in fields:
            raise ValueError(f"unknown option {key!r} of {simulator}; {_nearest(key, fields)}")
    return make_spec(name, tasks, MetaWorldOptions(**options))


def list_tasks(simulator: str) -> tuple[str, ...]:
    """Returns the task names of a simulator.

    Args:
        simulator: One of `SIMULATORS`.

    Raises:
        ValueError: Unknown simulator.
    """
    if simulator not in SIMULATORS:
        raise ValueError(f"unknown simulator {simulator!r}; {_nearest(simulator, SIMULATORS)}")
    return tuple(sorted(task_instructions()))


def parse_name(name: str) -> tuple[str, tuple[str, ...]]:
    """Splits an environment name.

    Args:
        name: As for `make_env`.

    Returns:
        Simulator, and task names without repetition.

    Raises:
        ValueError: Unknown simulator or task, no task, or a task named twice.
    """
    simulator, colon, listed = name.partition(":")
    if not colon:
        hint = f"; did you mean 'metaworld:{name}'?" if name in list_tasks("metaworld") else ""
        raise ValueError(f"environment name {name!r} must look like 'metaworld:reach-v3' (simulator:tasks){hint}")
    known = list_tasks(simulator)
    if listed == ALL_TASKS[simulator]:
        return simulator, known
    tasks = tuple(task.strip() for task in listed.split(",") if task.strip())
    if not tasks:
        raise ValueError(f"environment name {name!r} names no task; write for example '{simulator}:{known[0]}'")
    for task in tasks:
        if task not in known:
            choices = (*known, ALL_TASKS[simulator])
            raise ValueError(f"unknown task {task!r} of {simulator}; {_nearest(task, choices)}")
        if tasks.count(task) > 1:
            raise ValueError(f"task {task!r} is named twice in {name!r}")
    return simulator, tasks


def _nearest(given: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(given, names, n=5, cutoff=0.5)
    return f"nearest: {', '.join(close)}" if close else f"there are {', '.join(sorted(names))}"
