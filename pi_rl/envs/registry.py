"""Environments by name: `metaworld:reach-v3`, several tasks with commas, or all of them as `metaworld:mt50`."""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pi_rl.envs import calvin_options, gymnasium_env, libero_options, maniskill_options, metaworld_options, toy
from pi_rl.envs.vector_env import EnvSpec, VectorEnv
from pi_rl.envs.worker_process import DEFAULT_TIMEOUT_S
from pi_rl.envs.workers import WorkerVectorEnv


@dataclasses.dataclass(frozen=True)
class Workers:
    """How environments are spread over processes; see `pi_rl.envs.workers.WorkerVectorEnv`.

    Attributes:
        number: Processes; None means one per core.
        timeout_s: Seconds that one call of a simulator may take.
    """

    number: int | None
    timeout_s: float

    def start(
        self, spec: EnvSpec, simulator: str, options: Mapping[str, Any], num_envs: int, python: str = sys.executable
    ) -> WorkerVectorEnv:
        """Makes environments of a simulator in worker processes."""
        return WorkerVectorEnv(spec, simulator, options, num_envs, self.number, python, self.timeout_s)


@dataclasses.dataclass(frozen=True)
class Simulator:
    """What `make_env` needs to know about a simulator.

    Attributes:
        example: A task name for messages.
        options: Dataclass of its options.
        list_tasks: Returns its task names, sorted.
        make_spec: (name, tasks, options) to the specification; starts no worker.
        make: (spec, options, number of environments, worker processes) to the environment.
        groups: Names that stand for several tasks, such as "mt50".
        is_known: Whether a task may be used; by default, whether `list_tasks` has it.
    """

    example: str
    options: type
    list_tasks: Callable[[], tuple[str, ...]]
    make_spec: Callable[[str, Sequence[str], Any], EnvSpec]
    make: Callable[[EnvSpec, Any, int, Workers], VectorEnv]
    groups: Callable[[], Mapping[str, tuple[str, ...]]] = dict
    is_known: Callable[[str], bool] | None = None


def _metaworld_tasks() -> tuple[str, ...]:
    return tuple(sorted(metaworld_options.task_instructions()))


def _in_workers(simulator: str) -> Callable[[EnvSpec, Any, int, Workers], VectorEnv]:
    """Makes environments of a simulator in `pi_rl.envs.worker.BACKENDS`."""
    return lambda spec, options, num_envs, workers: workers.start(spec, simulator, vars(options), num_envs)


def _make_maniskill(
    spec: EnvSpec, options: maniskill_options.ManiSkillOptions, num_envs: int, workers: Workers
) -> VectorEnv:
    maniskill_options.check_assets([maniskill_options.TASKS[task] for task in spec.tasks], options.asset_folder)
    if options.backend == "gpu":
        from pi_rl.envs.maniskill_gpu import ManiSkillBatchedVectorEnv

        return ManiSkillBatchedVectorEnv(spec, options, num_envs)
    return _in_workers("maniskill")(spec, options, num_envs, workers)


def _make_libero(
    spec: EnvSpec, options: libero_options.LiberoOptions, num_envs: int, workers: Workers
) -> WorkerVectorEnv:
    assets = str(libero_options.find_assets(options.assets))  # missing files are told before workers start
    return workers.start(spec, "libero", {**vars(options), "assets": assets}, num_envs)


def _make_gymnasium(
    spec: EnvSpec, options: gymnasium_env.GymnasiumOptions, num_envs: int, workers: Workers
) -> VectorEnv:
    if spec.cameras:
        return _in_workers("gymnasium")(spec, options, num_envs, workers)
    return gymnasium_env.GymnasiumVectorEnv(spec, options, num_envs)


def _make_calvin(
    spec: EnvSpec, options: calvin_options.CalvinOptions, num_envs: int, workers: Workers
) -> WorkerVectorEnv:
    """Makes CALVIN environments, each in a worker of its own: pybullet's worlds in one process are not apart."""
    located = options.located()
    calvin_options.sequences_of(located.root)  # before the workers start, so that they find them in the cache
    assert located.python is not None
    one_each = dataclasses.replace(workers, number=num_envs)
    return one_each.start(spec, "calvin", vars(located), num_envs, located.python)


SIMULATORS = {
    "calvin": Simulator(
        "abc_d",
        calvin_options.CalvinOptions,
        calvin_options.task_names,
        calvin_options.make_spec,
        _make_calvin,
        groups=lambda: {task: (task,) for task in calvin_options.task_names()},
    ),
    "gymnasium": Simulator(
        "Pendulum-v1",
        gymnasium_env.GymnasiumOptions,
        gymnasium_env.registered_ids,
        gymnasium_env.make_spec,
        _make_gymnasium,
        is_known=gymnasium_env.is_known,
    ),
    "libero": Simulator(
        "spatial-0",
        libero_options.LiberoOptions,
        libero_options.task_names,
        libero_options.make_spec,
        _make_libero,
        groups=libero_options.groups,
    ),
    "maniskill": Simulator(
        "PickCube-v1",
        maniskill_options.ManiSkillOptions,
        maniskill_options.task_names,
        maniskill_options.make_spec,
        _make_maniskill,
        groups=maniskill_options.groups,
    ),
    "metaworld": Simulator(
        "reach-v3",
        metaworld_options.MetaWorldOptions,
        _metaworld_tasks,
        metaworld_options.make_spec,
        _in_workers("metaworld"),
        groups=metaworld_options.task_groups,
    ),
    "toy": Simulator(
        "point-mass",
        toy.ToyOptions,
        toy.task_names,
        toy.make_spec,
        lambda spec, options, num_envs, _: toy.make_toy_env(spec, options, num_envs),
    ),
}


def make_env(
    name: str,
    num_envs: int,
    num_workers: int | None = None,
    worker_timeout_s: float = DEFAULT_TIMEOUT_S,
    **options: Any,
) -> VectorEnv:
    """Makes a vector environment.

    Args:
        name: "SIMULATOR:TASK" or "SIMULATOR:TASK,TASK,…", such as "metaworld:reach-v3", "gymnasium:Pendulum-v1" or
            "toy:identity"; "metaworld:mt50" (or, as LeRobot writes such names, "metaworld_mt50") is all of MetaWorld's
            50 tasks; other groups are "ml45_train", "ml45_test", "easy", "medium", "hard" and "very_hard". Which of
            the tasks an environment runs is decided by the ids it is reset to.
        num_envs: Number B of environments, at least 1.
        num_workers: At most so many worker processes; None means one per core. Never more than `num_envs`, and none
            for toy environments and Gymnasium's without images, which are cheaper to step than to talk to. CALVIN
            has one per environment whatever is given.
        worker_timeout_s: Seconds that one call of a simulator may take, before its worker counts as hung and is
            replaced; see `pi_rl.envs.workers.WorkerVectorEnv`.
        **options: Fields of the simulator's options: `pi_rl.envs.metaworld_options.MetaWorldOptions`,
            `pi_rl.envs.gymnasium_env.GymnasiumOptions`, `pi_rl.envs.toy.ToyOptions`.

    Returns:
        The environment; close it, or use it in a `with` block.

    Raises:
        ValueError: Unknown simulator, task or option (the message lists the nearest names), or a bad value.
        RuntimeError: No off-screen renderer works; the message gives the command that installs one.
    """
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be at least 1 (or None for one per core), got {num_workers}")
    spec, checked = _describe(name, options)
    return SIMULATORS[parse_name(name)[0]].make(spec, checked, num_envs, Workers(num_workers, worker_timeout_s))


def check_name_and_options(name: str, options: Mapping[str, Any]) -> EnvSpec:
    """The specification that an environment would have; starts no worker.

    Args:
        name: As for `make_env`.
        options: As for `make_env`.

    Raises:
        ValueError: As for `make_env`.
    """
    return _describe(name, options)[0]


def _describe(name: str, options: Mapping[str, Any]) -> tuple[EnvSpec, Any]:
    """The specification and the checked options."""
    simulator, tasks = parse_name(name)
    entry = SIMULATORS[simulator]
    fields = [field.name for field in dataclasses.fields(entry.options)]
    for key in options:
        if key not in fields:
            raise ValueError(f"unknown option {key!r} of {simulator}; {_nearest(key, fields)}")
    checked = entry.options(**options)
    return entry.make_spec(name, tasks, checked), checked


def list_tasks(simulator: str) -> tuple[str, ...]:
    """Returns the task names of a simulator.

    Args:
        simulator: One of `SIMULATORS`.

    Raises:
        ValueError: Unknown simulator.
    """
    return _simulator(simulator).list_tasks()


def _simulator(name: str) -> Simulator:
    if name not in SIMULATORS:
        raise ValueError(f"unknown simulator {name!r}; {_nearest(name, SIMULATORS)}")
    return SIMULATORS[name]


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
    prefix, _, group = name.partition("_")
    if not colon and prefix in SIMULATORS and group in SIMULATORS[prefix].groups():
        return prefix, SIMULATORS[prefix].groups()[group]
    if not colon:
        owners = [key for key, entry in SIMULATORS.items() if name in (*entry.list_tasks(), *entry.groups())]
        hint = f"; did you mean '{owners[0]}:{name}'?" if owners else ""
        raise ValueError(f"environment name {name!r} must look like 'metaworld:reach-v3' (simulator:tasks){hint}")
    entry = _simulator(simulator)
    groups = entry.groups()
    if listed in groups:
        return simulator, groups[listed]
    tasks = tuple(task.strip() for task in listed.split(",") if task.strip())
    if not tasks:
        raise ValueError(f"environment name {name!r} names no task; write for example '{simulator}:{entry.example}'")
    known = entry.list_tasks()
    for task in tasks:
        if not (entry.is_known(task) if entry.is_known else task in known):
            raise ValueError(f"unknown task {task!r} of {simulator}; {_nearest(task, (*known, *groups))}")
        if tasks.count(task) > 1:
            raise ValueError(f"task {task!r} is named twice in {name!r}")
    return simulator, tasks


_LISTED = 12


def _nearest(given: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=5, cutoff=0.5)
    if close:
        return f"nearest: {', '.join(close)}"
    more = f", … and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"there are {', '.join(names[:_LISTED])}{more}"
