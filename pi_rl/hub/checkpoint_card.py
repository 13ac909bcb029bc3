"""The card of a policy folder in the middle of a run, or without results: what is known of it, and what is not."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi_rl.__about__ import simulator_of
from pi_rl.arguments import CONFIG_NAME
from pi_rl.checkpoint_order import RL_STATE_NAME
from pi_rl.hub.card import (
    OWN_TYPES,
    PAPER,
    card_metadata,
    evaluation_results,
    fenced,
    license_metadata,
    license_sentence,
    policy_config,
    save_card,
    start_of,
    version_lines,
)
from pi_rl.hub.model_card import SIMULATION_LIMITS, SMALL_LIMITS, write_model_card
from pi_rl.hub.results import format_success, short_name
from pi_rl.hub.run_record import (
    STATE_NAME,
    Entry,
    NoRecordError,
    RunRecord,
    merged_history,
    read_run,
    run_folder_of,
    summary_of,
)
from pi_rl.policies.lora import ADAPTER_CONFIG_FILE
from pi_rl.rollout.summary import EvalSummary


@dataclass(frozen=True)
class _Known:
    """What a folder's records say about its weights; None and empty where they do not.

    Attributes:
        step: Optimiser steps of reinforcement learning, 0 for the policy it starts from.
        iteration: Iterations.
        env_steps: Environment steps.
        algorithm: "PPO" or "GRPO".
        env: Name of the environment.
        base: Hub id of the policy that training started from.
        base_license: Licence that its own card states.
        start: The same policy in words.
        evaluations: Log entries up to these weights.
        config: Settings of the run.
        config_text: Their YAML.
        versions: Of packages, as the checkpoint has them, else the run's record.
    """

    step: int | None
    iteration: int | None
    env_steps: int | None
    algorithm: str
    env: str
    base: str | None
    base_license: str | None
    start: str
    evaluations: list[Entry]
    config: dict[str, Any]
    config_text: str
    versions: dict[str, str]

    @property
    def own_evaluation(self) -> EvalSummary | None:
        """The evaluation of these very weights, if there was one."""
        same = [entry for entry in self.evaluations if self.step is not None and entry.get("step", 0) == self.step]
        return summary_of(same[-1]) if same else None


def write_checkpoint_card(
    folder: Path,
    *,
    run_folder: Path | None = None,
    repo_id: str | None = None,
    history: Iterable[Entry] | None = None,
) -> Path:
    """Writes ``README.md`` into a policy folder: a ``checkpoint-N``, a run's ``policy`` or ``sft``, or any other.

    The result of a run that has ended gives the full card. Otherwise the card lists the evaluations so far, says which
    of them is of these weights, and says so where there is none.

    Args:
        folder: LeRobot policy folder.
        run_folder: Output folder of the run that it belongs to; by default the folder above, if it is one.
        repo_id: Hub id of the policy, used in the examples.
        history: Log entries of the trainer that holds these weights, which know more than what is on the disk.

    Returns:
        The card.

    Raises:
        ValueError: If it is no policy folder, or its records are damaged.
    """
    target = Path(folder)
    config = policy_config(target)
    record = _record(target, run_folder)
    if record is not None and record.results is not None and target.name == "policy":
        return _finished(target, record, repo_id)
    known = _known(target, record, history)
    given = known.config.get("model_license")
    license = given if given not in (None, "other") else known.base_license
    env = known.env
    name = f"{config['type']}{f' on {short_name(env)}' if env else ''}{_place(known)}"
    own = known.own_evaluation
    seeds = {"training_seed": known.config.get("seed"), "evaluation_seed": known.config.get("eval_seed")}
    versions = version_lines(known.versions, env)
    return save_card(
        target,
        "checkpoint_card.md",
        card_metadata(
            policy_type=config["type"],
            license=license,
            tags=_tags(known, env),
            base_model=known.base,
            name=name,
            eval_results=evaluation_results({env: own}, suite=simulator_of(env), settings=seeds)
            if own and env
            else (),
        ),
        title=name,
        summary=_summary(config["type"], known),
        evaluations=[_row(entry, known) for entry in known.evaluations],
        training=_training(known),
        load_from=repo_id or "path/to/this/folder",
        env=env,
        policy_type=config["type"],
        needs_package=config["type"].endswith("_small"),
        reproduce_command=_reproduce(known),
        configuration=fenced(known.config_text, "yaml") if known.config_text else "",
        versions=f"{versions['packages']}; simulator: {versions['simulator']}" if env else versions["packages"],
        limits=[*(SMALL_LIMITS if config["type"] in OWN_TYPES else ()), *SIMULATION_LIMITS],
        licence=license_sentence(license_metadata(license, config["type"])),
    )


def _record(folder: Path, run_folder: Path | None) -> RunRecord | None:
    """The run that a folder belongs to; None where it has no records, as in the first iteration of a trainer."""
    run = run_folder or run_folder_of(folder)
    if run is None or not run.is_dir():
        return None
    try:
        return read_run(run)
    except NoRecordError:
        return None


def _finished(folder: Path, record: RunRecord, repo_id: str | None) -> Path:
    results, root = record.results, record.folder
    assert results is not None
    curve, film = root / "learning_curve.png", root / "before_after.mp4"
    results.config.setdefault("eval_seed", record.config.get("eval_seed", "not recorded"))
    return write_model_card(
        folder,
        results,
        env_name=record.env,
        reproduce_command=f"pi-rl train --config {CONFIG_NAME} --algorithm {record.algorithm.lower()}",
        base_model=record.config.get("model", results.config.get("model")),
        license=results.config.get("model_license"),
        configuration=record.config_text,
        learning_curve=curve if curve.is_file() else None,
        video=film if film.is_file() else None,
        repo_id=repo_id,
    )


def _known(folder: Path, record: RunRecord | None, told: Iterable[Entry] | None) -> _Known:
    state, counters = _json(folder / STATE_NAME), _json(folder / RL_STATE_NAME)
    step = state.get("global_step")
    starts_here = step is None and folder.name in ("sft", "init")
    history = record.history if record is not None else state.get("log_history") or []
    if told is not None:
        history = merged_history([*history, *told])
    if starts_here:
        step = 0
        history = _baseline(record) or history
    elif step is None and counters:
        step = _step_of(counters.get("iteration"), history)
    evaluations = [
        entry for entry in history if "eval_success_rate" in entry and (step is None or entry.get("step", 0) <= step)
    ]
    config = record.config if record else {}
    env = str(config.get("env") or (counters.get("env") or {}).get("name") or "")
    base, base_license, start = _start(folder, config, counters)
    versions = counters.get("versions") or (record.versions if record else {})
    versions = versions if isinstance(versions, dict) else {}
    return _Known(
        step=step,
        iteration=0 if starts_here else counters.get("iteration"),
        env_steps=0 if starts_here else counters.get("env_steps"),
        algorithm=counters.get("algorithm") or (record.algorithm if record else "PPO"),
        env=env,
        base=base,
        base_license=base_license,
        start=start,
        evaluations=evaluations,
        config=config,
        config_text=record.config_text if record else "",
        versions={str(package): str(version) for package, version in versions.items()},
    )


def _start(folder: Path, config: dict[str, Any], counters: dict[str, Any]) -> tuple[str | None, str | None, str]:
    """What `start_of` gives; a recipe's settings name the policy, or that it made one, other records may not."""
    if "model" in config:
        return start_of(config["model"])
    named = counters.get("start") or _json(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    return start_of(str(named)) if named else (None, None, "a policy that was not recorded")


def _step_of(iteration: int | None, history: list[Entry]) -> int | None:
    """Optimiser steps at the end of an iteration, as far as the log has it."""
    if iteration == 0:
        return 0
    same = [entry for entry in history if "loss" in entry and entry.get("iteration") == iteration]
    return int(same[-1].get("step", 0)) if same else None


def _baseline(record: RunRecord | None) -> list[Entry]:
    """The evaluation of the policy that RL started from, as a log entry; of a finished run."""
    if record is None or record.results is None:
        return []
    figures = record.results.sft.metrics()
    return [{**{f"eval_{name}": value for name, value in figures.items()}, "env_steps": 0, "step": 0}]


def _json(file: Path) -> dict[str, Any]:
    """A mapping; empty where the file is missing.

    Raises:
        ValueError: It is no JSON mapping.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}. The checkpoint is damaged; take another.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON mapping. The checkpoint is damaged; take another.")
    return content


def _tags(known: _Known, env: str) -> Sequence[str]:
    learned = ["imitation-learning"] if known.iteration == 0 else []
    if known.iteration:
        learned = ["reinforcement-learning", known.algorithm.lower()]
    return [*learned, *([simulator_of(env)] if env else [])]


def _place(known: _Known) -> str:
    if known.iteration is None:
        return ""
    return f", iteration {known.iteration}" if known.iteration else ", before reinforcement learning"


def _reproduce(known: _Known) -> str:
    """The recipe's command; empty where the settings are those of a trainer in somebody's own program."""
    if "env" not in known.config:
        return ""
    return fenced(f"pi-rl train --config {CONFIG_NAME} --algorithm {known.algorithm.lower()}", "bash")


def _summary(policy_type: str, known: _Known) -> str:
    first = f"A flow-matching vision-language-action policy (LeRobot type `{policy_type}`)"
    first += f" for `{known.env}`" if known.env else ""
    if known.iteration is None:
        return f"{first}. Nothing more is recorded about how it was trained."
    if known.iteration == 0:
        return (
            f"{first}: the start of an online reinforcement-learning run ([πRL]({PAPER})), which began from "
            f"{known.start}."
        )
    planned = known.config.get("num_iterations")
    done = f"iteration {known.iteration}" + (f" of {planned}" if planned else "")
    noise = f" with {known.config['noise']} exploration" if known.config.get("noise") else ""
    begun = f", which began from {known.start}"
    return f"{first}, **a checkpoint after {done}** of {known.algorithm}{noise} ([πRL]({PAPER})){begun}."


def _training(known: _Known) -> str:
    if not known.env_steps or not known.iteration:
        return ""
    return f"Trained on {known.env_steps:,} environment steps, iterations of {known.algorithm}: {known.iteration}."


def _row(entry: Entry, known: _Known) -> list[str]:
    summary, step = summary_of(entry), entry.get("step", 0)
    iteration = f"{entry['epoch']:g}" if "epoch" in entry else ("0" if step == 0 else "–")
    same = known.step is not None and step == known.step
    whose = "these" if same else "an earlier state" if known.step is not None else "not known"
    env_steps = f"{int(entry.get('env_steps', 0)):,}"
    return [iteration, env_steps, format_success(summary), str(summary.n_episodes), whose]
