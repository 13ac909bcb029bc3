"""Episodes of an evaluation on disk, one line each as it ends, so that an interrupted evaluation can be gone on with.

settings.json    what decides the results; written before the first episode
episodes.jsonl   one JSON object per episode, in the order in which they ended
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pi_rl.envs.vector_env import EnvSpec
from pi_rl.rollout.evaluator import EpisodeResults

SETTINGS_NAME, EPISODES_NAME = "settings.json", "episodes.jsonl"
_SHOWN = 6


def write_json(path: Path, data: Any) -> None:
    """Writes a JSON file that replaces an existing one as a whole."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class EpisodeLog:
    """Episodes of one evaluation; opening its folder again continues it.

    Use it in a `with` block. Only one process at a time may have a folder open.

    Args:
        folder: Created if missing.
        settings: JSON-ready; whatever the results depend on.
        spec: Of the environment.
        ids: (n, 2) task index and state id of the episodes to run.
        seed: Seed of the flow's initial noise, noted with every episode.

    Raises:
        ValueError: The folder holds an evaluation with other settings (the message says which), other files, or
            damaged lines; or another process has it open.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], spec: EnvSpec, ids: np.ndarray, seed: int) -> None:
        self.folder, self.spec, self.ids, self.seed = Path(folder), spec, ids, seed
        self._wanted = {(int(task), int(state)): row for row, (task, state) in enumerate(ids)}
        claimed = _check_folder(self.folder, settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / EPISODES_NAME).open("a+", encoding="utf-8")
        try:
            self._lock()
            if not claimed:
                write_json(self.folder / SETTINGS_NAME, dict(settings))
            self.episodes: dict[int, dict[str, Any]] = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "EpisodeLog":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def remaining(self) -> np.ndarray:
        """(m, 2) ids of the episodes that were not run yet, in their order."""
        return self.ids[[row not in self.episodes for row in range(len(self.ids))]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The episodes run so far, in the order of `ids`."""
        return [self.episodes[row] for row in sorted(self.episodes)]

    def add(self, results: EpisodeResults, index: int) -> None:
        """Notes that an episode has ended, safely on the disk; made for `on_episode` of `evaluate_policy`."""
        task, state_id = results.reset_ids[index].tolist()
        episode = {
            "task": self.spec.tasks[task],
            "task_index": task,
            "instruction": self._instruction(task, state_id),
            "state_id": state_id,
            "success": bool(results.success[index]),
            "length": int(results.length[index]),
            "return": float(results.returns[index]),
            "seed": self.seed,
            "failed": bool(results.failed[index]),
        }
        self.episodes[self._wanted[task, state_id]] = episode
        self._file.write(json.dumps(episode, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def results(self) -> EpisodeResults:
        """The outcome of all episodes, in the order of `ids`.

        Raises:
            ValueError: Some were not run yet.
        """
        if len(self.episodes) < len(self.ids):
            raise ValueError(f"{len(self.episodes)} of {len(self.ids)} episodes were run; the others are missing")
        rows = self.rows
        results = EpisodeResults.empty(self.spec, self.ids)
        results.success[:] = [row["success"] for row in rows]
        results.length[:] = [row["length"] for row in rows]
        results.returns[:] = [row["return"] for row in rows]
        results.failed[:] = [row["failed"] for row in rows]
        return results

    def _instruction(self, task: int, state_id: int) -> str:
        told = (self.spec.instruction(task, state_id, solved) for solved in range(self.spec.subtasks))
        return "; then ".join(told)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is writing to {self.folder}; wait for it, or give another --output_dir."
            ) from None

    def _read(self) -> dict[int, dict[str, Any]]:
        """Episodes of an earlier process; a last line that a kill cut short is removed."""
        path = self.folder / EPISODES_NAME
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            os.truncate(path, len(complete))
        found: dict[int, dict[str, Any]] = {}
        for number, line in enumerate(complete.decode("utf-8", errors="replace").split("\n")[:-1], 1):
            try:
                episode = json.loads(line)
                found[self._wanted[episode["task_index"], episode["state_id"]]] = episode
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"line {number} of {path} is no episode of this evaluation: {line[:80]!r}. Remove that line (its "
                    "episode is then run again), or give another --output_dir."
                ) from None
        return found


def _check_folder(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder holds the same evaluation; False for a new one."""
    path = folder / SETTINGS_NAME
    if not path.is_file():
        there = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        if set(there) - {EPISODES_NAME}:  # a process that was killed at its very start leaves that one, empty
            raise ValueError(f"{folder} is not empty and holds no evaluation; give another --output_dir.")
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        different = _differences(before, json.loads(json.dumps(dict(settings))))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give another --output_dir.") from error
    if different:
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise ValueError(
            f"{folder} holds an evaluation with other settings: {'; '.join(different[:_SHOWN])}{more}. Repeat its "
            "command to continue it, give another --output_dir, or delete the folder."
        )
    return True


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`name was …, now …` for every entry that differs, down into mappings."""
    found: list[str] = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {_short(old)}, now {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
