"""Which demonstrations supervised fine-tuning uses, and whether a dataset and a policy fit; imports no torch."""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

STATE_KEY, ACTION_KEY = "observation.state", "action"
NORMALIZATIONS = {"mean_std": ("mean", "std"), "quantiles": ("q01", "q99")}
"""Statistics that each normalisation of states and actions needs."""
_SUBSET_STREAM = 0x5F7


def choose_episodes(
    tasks: Sequence[str],
    *,
    episodes: Sequence[int] | None = None,
    num_episodes: int | None = None,
    episodes_per_task: int | None = None,
    only_tasks: Sequence[str] = (),
    except_tasks: Sequence[str] = (),
    covers_tasks: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Chooses the demonstrations of a few-shot subset.

    Without numbers every episode is taken. A number of episodes is drawn without replacement, stratified by task: each
    task gives equally many, and the tasks that give one more are drawn too. A task with too few gives what it has; the
    others make up for it. The choice depends on the tasks' order in ``tasks`` and on ``seed`` only.

    Args:
        tasks: Instruction of each episode, in the order of the episodes.
        episodes: Episodes by number, instead of a draw.
        num_episodes: Episodes to draw over all tasks.
        episodes_per_task: Episodes to draw of each task.
        only_tasks: Instructions to choose from; empty stands for all.
        except_tasks: Instructions to leave out.
        covers_tasks: How many tasks the chosen episodes must show: guards published episode numbers against a dataset
            in another order. None asks for nothing.
        seed: Of the draw.

    Returns:
        Sorted episode numbers.

    Raises:
        ValueError: If the demands contradict each other or the dataset cannot meet them.
    """
    given = [value for value in (episodes, num_episodes, episodes_per_task) if value is not None]
    if len(given) > 1:
        raise ValueError("episodes, num_episodes and episodes_per_task exclude each other; give one of them.")
    pool = _episodes_by_task(tasks, only_tasks, except_tasks)
    if episodes is not None:
        chosen = _checked_episodes(episodes, pool, len(tasks))
    elif given:
        wanted = num_episodes if num_episodes is not None else int(episodes_per_task or 0) * len(pool)
        chosen = _draw(pool, wanted, episodes_per_task, seed)
    else:
        chosen = [episode for members in pool.values() for episode in members]
    shown = Counter(tasks[episode] for episode in chosen)
    if covers_tasks is not None and len(shown) != covers_tasks:
        raise ValueError(
            f"The {len(chosen)} chosen episodes show {len(shown)} tasks instead of covers_tasks={covers_tasks}: the "
            "dataset has other tasks or its episodes stand in another order. Use the dataset that the numbers belong "
            "to, or draw a subset with num_episodes or episodes_per_task."
        )
    return sorted(chosen)


def check_dataset(features: Mapping[str, Mapping[str, Any]], stats: Mapping[str, Any], config: Any) -> None:
    """Checks that a policy can be trained on a dataset.

    Args:
        features: Features of the dataset by key, as in its ``meta/info.json``.
        stats: Its statistics by feature.
        config: LeRobot configuration of a π0 or π0.5 policy.

    Raises:
        ValueError: If there is no camera, a state or an action is missing or too large, or statistics are missing:
            LeRobot would then train on numbers that are not normalised.
    """
    if not camera_keys(features):
        raise ValueError(
            f"The dataset has no camera named observation.image…; its features are {', '.join(sorted(features))}. "
            "Rename its features (lerobot-edit-dataset) or take a dataset in LeRobot's naming."
        )
    for key, limit, kind in (
        (STATE_KEY, config.max_state_dim, "STATE"),
        (ACTION_KEY, config.max_action_dim, "ACTION"),
    ):
        if key not in features:
            raise ValueError(f"The dataset has no feature {key!r}; its features are {', '.join(sorted(features))}.")
        shape = tuple(features[key]["shape"])
        if len(shape) != 1 or shape[0] > limit:
            raise ValueError(
                f"{key!r} of the dataset has shape {shape}; the policy takes vectors of up to {limit} numbers."
            )
        mode = str(getattr(config.normalization_mapping[kind], "value", config.normalization_mapping[kind])).lower()
        missing = [name for name in NORMALIZATIONS.get(mode, ()) if name not in stats.get(key, {})]
        if missing:
            raise ValueError(
                f"The dataset's statistics of {key!r} lack {' and '.join(missing)}, which the policy's {mode} "
                "normalisation needs. Add them with LeRobot's augment_dataset_quantile_stats.py, or set "
                "normalization: mean_std."
            )


def camera_keys(features: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys of the camera images among a dataset's features, in their order."""
    return [
        key
        for key, feature in features.items()
        if feature["dtype"] in ("image", "video") and key.startswith("observation.")
    ]


def _episodes_by_task(tasks: Sequence[str], only: Sequence[str], without: Sequence[str]) -> dict[str, list[int]]:
    pool: dict[str, list[int]] = {}
    for episode, task in enumerate(tasks):
        pool.setdefault(task, []).append(episode)
    for task in (*only, *without):
        if task not in pool:
            near = difflib.get_close_matches(task, pool, n=3) or sorted(pool)[:3]
            raise ValueError(f"No episode shows the task {task!r}; the nearest: {'; '.join(near)}.")
    left = {task: pool[task] for task in sorted(only or pool) if task not in without}
    if not left:
        raise ValueError(
            f"only_tasks={list(only)} and except_tasks={list(without)} leave no task of the dataset's {len(pool)}; "
            "a task must not be in both."
        )
    return left


def _checked_episodes(episodes: Sequence[int], pool: Mapping[str, list[int]], total: int) -> list[int]:
    known = {episode for members in pool.values() for episode in members}
    twice = sorted(episode for episode, times in Counter(episodes).items() if times > 1)
    absent = sorted(set(episodes) - known)
    if absent:
        raise ValueError(
            f"Episodes {absent[:8]} are not in the dataset, which has 0 to {total - 1}"
            + ("." if len(known) == total else ", or do not show the tasks asked for.")
        )
    if twice or not episodes:
        raise ValueError(f"episodes must name each episode once, and at least one; {twice[:8]} are there twice.")
    return list(episodes)


def _draw(pool: Mapping[str, list[int]], wanted: int, per_task: int | None, seed: int) -> list[int]:
    """Round after round, one episode of each task that still has some; the tasks of the last round are drawn."""
    available = sum(map(len, pool.values()))
    short = [task for task, members in pool.items() if per_task is not None and len(members) < per_task]
    if wanted < 1 or wanted > available or short:
        named = f" ({short[0]!r} has {len(pool[short[0]])})" if short else ""
        raise ValueError(
            f"{wanted} episodes of {len(pool)} tasks were asked for, and the dataset has {available} of these "
            f"tasks{named}; ask for fewer."
        )
    rng = np.random.default_rng([seed, _SUBSET_STREAM])
    shuffled = {task: [int(one) for one in rng.permutation(members)] for task, members in pool.items()}
    chosen: list[int] = []
    while len(chosen) < wanted:
        left = [task for task, members in shuffled.items() if members]
        if wanted - len(chosen) < len(left):
            left = [left[int(i)] for i in rng.choice(len(left), wanted - len(chosen), replace=False)]
        chosen += [shuffled[task].pop() for task in left]
    return chosen
