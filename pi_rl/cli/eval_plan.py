"""What `pi-rl eval` runs: which tasks, which of their initial states, and the policy in a folder."""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi_rl.checkpoint_order import by_age
from pi_rl.envs.vector_env import EnvSpec

ALL_STATES_UP_TO = 1000
"""All evaluation states are run, unless the user says otherwise, where there are at most so many."""
DEFAULT_PER_TASK = 10
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_POLICY_FILES = ("config.json", *_WEIGHT_FILES, "policy_*.json", "policy_*.safetensors", *_TOKENIZER_FILES)
_INSIDE = ("policy", "pretrained_model", "checkpoints/last/pretrained_model", "sft")
"""Where a training run's folder holds a policy; `checkpoint-N` comes after the first three."""


def choose_tasks(spec: EnvSpec, words: Sequence[str]) -> list[int]:
    """Indices of the tasks to evaluate, in the environment's order.

    Args:
        spec: Of the environment.
        words: Task names or indices, several in a word with commas; none stands for all.

    Raises:
        ValueError: One is unknown or named twice.
    """
    chosen: list[int] = []
    for name in (part.strip() for word in words for part in word.split(",") if part.strip()):
        index = int(name) if re.fullmatch(r"[0-9]+", name) else None
        if index is None and name in spec.tasks:
            index = spec.tasks.index(name)
        if index is None or index >= len(spec.tasks):
            near = difflib.get_close_matches(name, spec.tasks, n=4, cutoff=0.5) or list(spec.tasks[:8])
            raise ValueError(
                f"{spec.name} has no task {name!r}; nearest: {', '.join(near)}, or an index from 0 to "
                f"{len(spec.tasks) - 1}."
            )
        if index in chosen:
            raise ValueError(f"task {spec.tasks[index]} is named twice.")
        chosen.append(index)
    return sorted(chosen) or list(range(len(spec.tasks)))


def choose_states(spec: EnvSpec, text: str) -> list[int]:
    """State ids from `0-4,7`.

    Args:
        spec: Knows how many evaluation states there are.
        text: Numbers and ranges (both ends included), separated by commas.

    Raises:
        ValueError: Not of that form, out of range, or repeated.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        if match is None:
            raise ValueError(f"--states {text!r} must be numbers and ranges with commas, such as 0-4,7.")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= spec.eval_states:
            raise ValueError(
                f"--states {part.strip()} does not exist: {spec.name} has the evaluation states 0 to "
                f"{spec.eval_states - 1} of each task."
            )
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise ValueError(f"--states {text!r} names a state twice.")
    return sorted(found)


def plan_episodes(
    spec: EnvSpec, tasks: Sequence[int], episodes: int | None, states: Sequence[int] | None
) -> tuple[np.ndarray, str]:
    """The initial states to run.

    Args:
        spec: Of the environment.
        tasks: Indices of the tasks.
        episodes: How many in total, or None.
        states: State ids of each task, or None; not together with `episodes`.

    Returns:
        (n, 2) int64 task index and state id, tasks alternating; and a sentence that says which they are.

    Raises:
        ValueError: The episodes cannot be shared equally, or there are fewer states.
    """
    from pi_rl.rollout.evaluator import evaluation_ids

    if states is not None:
        ids = np.array([(task, state) for state in states for task in tasks], np.int64)
        return ids, f"{len(states)} chosen initial state(s) of each of {len(tasks)} task(s)"
    there = spec.eval_states * len(tasks)
    wanted = episodes or (there if there <= ALL_STATES_UP_TO else DEFAULT_PER_TASK * len(tasks))
    part = dataclasses.replace(spec, tasks=tuple(spec.tasks[task] for task in tasks))
    ids = evaluation_ids(part, wanted)
    ids[:, 0] = np.asarray(tasks)[ids[:, 0]]
    each = wanted // len(tasks)
    if wanted == there:
        return ids, f"all {each} evaluation states of each of {len(tasks)} task(s)"
    chosen = f"the first {each} of {spec.eval_states:,} evaluation states of each of {len(tasks)} task(s)"
    return ids, chosen if episodes else f"{chosen}; --episodes N runs another number"


def find_policy(given: str, revision: str | None) -> Path:
    """The policy folder that a user means.

    Args:
        given: A policy folder, the folder of a training run or of one of its checkpoints, or a Hub id.
        revision: Hub commit, branch or tag; only for Hub ids.

    Raises:
        ValueError: It is none of these, or holds no policy.
    """
    folder = Path(given).expanduser().absolute()
    if not folder.is_dir() or revision is not None:
        from pi_rl.policies.checkpoints import policy_folder  # slow to import

        folder = policy_folder(given, revision)
    found = policy_within(folder)
    if found is None:
        raise ValueError(
            f"{given} holds no policy: there is neither config.json nor a policy in {', '.join(_INSIDE)} or "
            "checkpoint-N. Give a policy folder in LeRobot's layout, a training run's folder, or a Hub id."
        )
    return found


def policy_within(folder: Path) -> Path | None:
    """The folder itself if it has a policy's configuration, or else the policy of the training run in it.

    Args:
        folder: An existing folder.

    Returns:
        None if there is no policy in any of the places where a run has one.
    """
    names = ["", *_INSIDE[:3], *(path.name for path in reversed(by_age(folder))), *_INSIDE[3:]]
    return next((folder / name for name in names if (folder / name / "config.json").is_file()), None)


def describe_policy(folder: Path, given: str) -> dict[str, Any]:
    """What identifies a policy in results.

    Args:
        folder: Policy folder.
        given: What the user named; a path is shortened to its last parts.

    Returns:
        `id`; `revision`, the commit where it came from the Hub; `type`; `sha256` of all files that decide actions;
        and the stored `n_action_steps` and `denoising_steps`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    from_hub = folder.parent.name == "snapshots"
    return {
        "id": given if from_hub else "/".join(folder.parts[-2:]),
        "revision": folder.name if from_hub else None,
        "type": config.get("type"),
        "sha256": _digest(folder),
        "n_action_steps": config.get("n_action_steps"),
        "denoising_steps": config.get("num_inference_steps"),
    }


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for pattern in _POLICY_FILES for path in folder.glob(pattern)):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
