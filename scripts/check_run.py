"""Checks that a finished run of a recipe left what it promises; exits with 1 and the list of what is missing."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

FIRST_RATIO_TOLERANCE = 1e-4


def problems_of(folder: Path) -> list[str]:
    """What is wrong with a run's folder; empty when nothing is."""
    problems = [f"{name} is missing" for name in missing_files(folder)]
    if not (folder / "results.json").is_file():
        return problems
    results = json.loads((folder / "results.json").read_text())
    for stage in ("sft", "rl"):
        summary = results[stage]
        if not 0 <= summary["ci95"][0] <= summary["success_rate"] <= summary["ci95"][1] <= 1:
            problems.append(f"{stage}: success {summary['success_rate']} outside its interval {summary['ci95']}")
        if sum(part["n_episodes"] for part in summary["per_task"].values()) != summary["n_episodes"]:
            problems.append(f"{stage}: the tasks' episodes do not add up to {summary['n_episodes']}")
    if results["env_steps"] <= 0:
        problems.append("no environment steps were counted")
    made_here = read_config(folder)["model"] is None
    for stage in (*(("demonstrations", "sft") if made_here else ()), "baseline", "rl", "evaluation"):
        if stage not in results["minutes"]:
            problems.append(f"no time was taken for stage {stage}")
    return problems + problems_of_history(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The run's options."""
    return yaml.safe_load((folder / "pi_rl_config.yaml").read_text())


def missing_files(folder: Path) -> list[str]:
    """Promised files that are absent or empty."""
    policy = ("config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json", "README.md")
    promised = [
        "results.json",
        "pi_rl_config.yaml",
        "learning_curve.png",
        "metrics.jsonl",
        "report.html",
        "trainer_state.json",
        *(f"policy/{name}" for name in policy),
    ]
    if not (folder / "pi_rl_config.yaml").is_file():
        return ["pi_rl_config.yaml"]
    config = read_config(folder)
    if config["video"]:
        promised.append("before_after.mp4")
    if config["model"] is None:
        promised += ["demos/meta/info.json", *(f"sft/{name}" for name in policy[:-1])]
    if "critic" in config:
        promised.append("policy/critic.safetensors")
    if config["lora_rank"]:
        promised.append("policy/adapter/adapter_model.safetensors")
    return [name for name in promised if not (folder / name).is_file() or (folder / name).stat().st_size == 0]


def problems_of_history(folder: Path) -> list[str]:
    """The log must hold every iteration, and where something was learned the first minibatch must have ratio 1."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    # GRPO learns nothing in an iteration whose groups are all uniform
    idle = [entry for entry in logged if entry.get("groups/informative") == 0]
    errors = [entry["policy/ratio_error_first"] for entry in logged if "policy/ratio_error_first" in entry]
    iterations = json.loads((folder / "results.json").read_text())["config"]["num_iterations"]
    if len(logged) != iterations or len(errors) + len(idle) < iterations:
        return [f"the log holds {len(logged)} of {iterations} iterations, {len(errors)} of them with a first ratio"]
    if errors and max(errors) > FIRST_RATIO_TOLERANCE:
        return [f"the first minibatch's ratio is off by {max(errors):.2e} (allowed: {FIRST_RATIO_TOLERANCE})"]
    return []


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of the run")
    folder = parser.parse_args().folder
    problems = problems_of(folder)
    for problem in problems:
        print(f"- {problem}")
    print(f"{folder}: " + (f"{len(problems)} problem(s)" if problems else "all artefacts are there, first ratio is 1"))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
