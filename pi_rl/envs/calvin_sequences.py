"""CALVIN's sequences of five subtasks: the 1,000 of its evaluation, and others for training.

Which subtask is possible when, what it changes, where objects stand at the start and the sentences are read from the
user's checkout. Nothing of it is imported, because its modules import torch and pyhash (which no longer builds). Used
by the training process and, under another Python, by the workers: numpy and yaml only.
"""

import ast
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pi_rl.envs.calvin_install import ANNOTATIONS, RULES, STATES
from pi_rl.envs.vector_env import TRAIN_STATE_OFFSET

logger = logging.getLogger(__name__)
SUBTASKS = 5
EVAL_SEQUENCES = 1000
EVAL_SCENE = "D"
PUBLISHED_DIGEST = "90191d9ac76baecb4f292ab766bbbf3ae65dbf43a83bbe5c376d99db10fd6446"
"""SHA-256 of the 1,000 sequences that CALVIN's own generator yields, as JSON with sorted keys and no spaces."""

Condition = Mapping[str, int | str]
"""Symbolic initial state, such as {"led": 0, "slider": "left", "red_block": "table", ...}."""
Symbols = tuple[int | str, ...]
"""Values of a condition."""


@dataclass(frozen=True)
class Episode:
    """What happens in one episode.

    Attributes:
        scene: "A", "B", "C" or "D".
        condition: Where things are at the start.
        subtasks: Five names, in the order in which they are asked for.
    """

    scene: str
    condition: Condition
    subtasks: tuple[str, ...]


class Rules:
    """When a subtask is possible and what it changes, as the checkout states it.

    Attributes:
        names: Subtasks, in the order of the checkout.
        conditions: Initial states: one or two blocks on the table, no two on the same side of the cabinet.
        digest: Of everything that was read; 16 hexadecimal digits.

    Args:
        path: The checkout's `multistep_sequences.py`.

    Raises:
        ValueError: A table is not in the file.
    """

    def __init__(self, path: Path):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self._tasks: dict[str, list[dict[str, Any]]] = _literal(tree, "tasks", path)
        categories: dict[str, int] = _literal(tree, "task_categories", path)
        possible: dict[str, list[int | str]] = _literal(tree, "possible_conditions", path)
        self.names = tuple(self._tasks)
        self._categories = [categories[name] for name in self.names]
        self._symbols = tuple(possible)
        self.conditions = tuple(
            dict(zip(possible, values, strict=True))
            for values in itertools.product(*possible.values())
            if values.count("table") in (1, 2) and values.count("slider_left") < 2 and values.count("slider_right") < 2
        )
        read = json.dumps([self._tasks, categories, possible])
        self.digest = hashlib.sha256(read.encode()).hexdigest()[:16]
        self._after: dict[tuple[Symbols, int], Symbols | None] = {}

    def draw(self, generator: np.random.RandomState, condition: Condition) -> tuple[str, ...]:
        """Draws five subtasks that can be done one after another and belong to different categories.

        Five distinct subtasks are drawn until that holds, which is uniform over all such sequences (about one in
        6,000 is; 20 ms).

        Args:
            generator: Source of the draws; it takes from it what `choice` without replacement would take.
            condition: One of `conditions`.
        """
        start: Symbols = tuple(condition.values())
        while True:
            drawn = generator.permutation(len(self.names))[:SUBTASKS].tolist()
            if self._possible(start, drawn) and len({self._categories[subtask] for subtask in drawn}) == SUBTASKS:
                return tuple(self.names[subtask] for subtask in drawn)

    def _possible(self, symbols: Symbols, subtasks: Sequence[int]) -> bool:
        for subtask in subtasks:
            after = self._change(symbols, subtask)
            if after is None:
                return False
            symbols = after
        return True

    def _change(self, symbols: Symbols, subtask: int) -> Symbols | None:
        """The state after a subtask; None unless exactly one of its rules applies."""
        key = (symbols, subtask)
        if key not in self._after:
            state = dict(zip(self._symbols, symbols, strict=True))
            applicable = [rule["effect"] for rule in self._tasks[self.names[subtask]] if _holds(rule, state)]
            self._after[key] = tuple({**state, **applicable[0]}.values()) if len(applicable) == 1 else None
        return self._after[key]


def _holds(rule: Mapping[str, Any], state: Condition) -> bool:
    return all(
        state[name] in wanted if isinstance(wanted, list) else state[name] == wanted
        for name, wanted in rule["condition"].items()
    )


def _literal(tree: ast.Module, name: str, path: Path) -> Any:
    """The value assigned to a name, which must be a literal, anywhere in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.literal_eval(node.value)
    raise ValueError(f"{path} assigns no table to the name {name}; use the main branch of github.com/mees/calvin")


def evaluation_sequences(rules: Rules, count: int = EVAL_SEQUENCES) -> list[tuple[Condition, tuple[str, ...]]]:
    """Draws the sequences of CALVIN's evaluation with the seeds that it uses (25 s for the 1,000).

    Args:
        rules: Of the checkout.
        count: How many.

    Returns:
        Initial condition and subtasks of each, in CALVIN's order.
    """
    shares = [len(part) for part in np.array_split(np.arange(count), len(rules.conditions))]
    drawn = []
    for seed, (condition, share) in enumerate(zip(rules.conditions, shares, strict=True)):
        generator = np.random.RandomState(seed)
        drawn += [(condition, rules.draw(generator, condition)) for _ in range(share)]
    order = np.arange(count)
    np.random.RandomState(0).shuffle(order)
    return [drawn[position] for position in order]


def digest_of(sequences: Sequence[tuple[Condition, Sequence[str]]]) -> str:
    """SHA-256 of sequences, to be compared with `PUBLISHED_DIGEST`."""
    plain = [[dict(condition), list(subtasks)] for condition, subtasks in sequences]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _cached_sequences(rules: Rules) -> list[tuple[Condition, tuple[str, ...]]]:
    """The evaluation's sequences from the user's cache folder, where they are put the first time."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pi_rl"
    path = folder / f"calvin_sequences_{rules.digest}.json"
    kept = path.is_file()
    if kept:
        drawn = json.loads(path.read_text(encoding="utf-8"))
        sequences = [(condition, tuple(subtasks)) for condition, subtasks in drawn]
    else:
        sequences = evaluation_sequences(rules)
    if digest_of(sequences) != PUBLISHED_DIGEST:
        logger.warning(
            "the rules of this CALVIN checkout yield other evaluation sequences than the published ones: average "
            "lengths cannot be compared with published numbers"
        )
    if kept:
        return sequences
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            json.dump(sequences, file)
        os.replace(file.name, path)  # at once: other processes may be reading
    except OSError as error:
        logger.warning(f"the CALVIN sequences could not be kept in {folder} ({error}): every process draws them anew")
    return sequences


class CalvinSequences:
    """Episodes by state id: below 1,000 those of CALVIN's evaluation, from `TRAIN_STATE_OFFSET` up training's.

    A training episode never has both the initial condition and the subtasks of an evaluation episode.

    Args:
        root: The checkout.

    Raises:
        FileNotFoundError: A file of the checkout is missing.
        ValueError: A file has not the expected content.
    """

    def __init__(self, root: Path):
        self._root = root
        self.rules = Rules(root / RULES)
        self._evaluation = _cached_sequences(self.rules)
        self._forbidden = {(tuple(condition.values()), subtasks) for condition, subtasks in self._evaluation}
        self._sentences: dict[str, list[str]] = yaml.safe_load((root / ANNOTATIONS).read_text(encoding="utf-8"))
        self.episode = functools.lru_cache(maxsize=4096)(self._episode)
        """(state id, scenes of training) to the episode."""

    def _episode(self, state_id: int, train_scenes: str) -> Episode:
        if state_id < TRAIN_STATE_OFFSET:
            return Episode(EVAL_SCENE, *self._evaluation[state_id])
        generator = np.random.RandomState(np.random.MT19937(state_id))
        scene = train_scenes[generator.randint(len(train_scenes))]
        condition = self.rules.conditions[generator.randint(len(self.rules.conditions))]
        subtasks = self.rules.draw(generator, condition)
        while (tuple(condition.values()), subtasks) in self._forbidden:
            subtasks = self.rules.draw(generator, condition)
        return Episode(scene, condition, subtasks)

    def sentence(self, subtask: str) -> str:
        """The instruction of a subtask, as in CALVIN's evaluation."""
        if subtask not in self._sentences:
            raise ValueError(f"{self._root / ANNOTATIONS} has no sentence for {subtask}")
        return self._sentences[subtask][0]

    def initial_state(self, condition: Condition) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """State of the robot (15,) and of the scene (24,) at the start, by the checkout's own function."""
        return _initial_state_function(self._root / STATES)(dict(condition))


@functools.cache
def _initial_state_function(path: Path) -> Any:
    """The one function that is needed of a module whose imports are not to be had."""
    name = "get_env_state_for_initial_condition"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:
        raise ValueError(f"{path} defines no {name}; use the main branch of github.com/mees/calvin")
    tree.body = list(found)
    names: dict[str, Any] = {"np": np, "pi": np.pi, "hasher": fnv_hash, "temp_seed": _seeded}
    exec(compile(tree, str(path), "exec"), names)
    return names[name]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds numpy's global generator for a while."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def fnv_hash(text: str) -> int:
    """What `pyhash.fnv1_32()` makes of a string: FNV-1 of its UTF-16 bytes, starting from 0; 32 bits."""
    value = 0
    for byte in text.encode("utf-16-le"):
        value = (value * 0x01000193 & 0xFFFFFFFF) ^ byte
    return value
