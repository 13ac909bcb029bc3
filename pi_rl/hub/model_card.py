"""The model card of a trained policy: YAML metadata with the evaluation, numbers, pictures, limits, command."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pi_rl.hub.results import (
    RunResults,
    format_minutes,
    results_rows_markdown,
    runs_table,
    short_name,
    summary_parts,
)
from pi_rl.rollout.summary import TaskSummary

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
CARD_NAME = "README.md"
TAGS = ("pi_rl", "reinforcement-learning", "flow-matching", "vision-language-action", "lerobot", "robotics")

_SMALL_LIMITS = (
    "A very small network, trained from random weights for a demonstration; it knows no other task, object or scene.",
    "Its tokenizer was trained on the instructions of its own tasks; other wordings carry no meaning for it.",
)
_SIMULATION_LIMITS = (
    "Simulation only: it has never seen a real robot and must not drive one.",
    "Initial states come from the object range in the run's configuration; elsewhere success is unknown.",
    "One training seed per checkpoint: the interval covers the evaluation episodes, not the spread between seeds.",
)
_BLIND_LIMIT = (
    "Blind control: the policy saw a constant image in training and evaluation. It exists for comparison only."
)


def write_model_card(
    folder: str | Path,
    results: RunResults,
    *,
    env_name: str,
    reproduce_command: str,
    base_model: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    title: str | None = None,
    learning_curve: str | Path | None = None,
    video: str | Path | None = None,
    other_runs: Sequence[RunResults] = (),
    limits: Sequence[str] = (),
    repo_id: str | None = None,
) -> Path:
    """Writes ``README.md`` into a policy folder and copies the picture and the video beside it.

    Args:
        folder: LeRobot policy folder; ``config.json`` tells the policy type and the denoising steps.
        results: Numbers of the run.
        env_name: Environment, for example ``"metaworld:handle-press-v3"``.
        reproduce_command: Command line that repeats the run.
        base_model: Hub id of the policy the run started from; None for a small policy trained from random weights.
        dataset: Hub id of the demonstrations, if they are published.
        license: Licence of the weights; Apache-2.0 for a small policy, else it must be given.
        title: Heading; by default made of policy type, environment and sampler.
        learning_curve: PNG shown at the top.
        video: MP4 linked from the card.
        other_runs: Results of further seeds, for a table of all.
        limits: Further sentences under "Limits".
        repo_id: Hub id of this checkpoint, used in the example.

    Returns:
        The card.

    Raises:
        ValueError: If the folder is no policy folder, the licence of a fine-tuned base model is missing, or the
            metadata does not survive reloading.
    """
    from huggingface_hub import ModelCard

    target = Path(folder)
    config = _policy_config(target)
    if base_model is not None and license is None:
        raise ValueError(f"The weights derive from {base_model}; give the licence of that model.")
    name = title or f"{config['type']} on {short_name(env_name)}, {results.noise}"
    card_data = _card_data(results, env_name, name, base_model, dataset, license or "apache-2.0")
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=name,
        summary=_summary(results, config, env_name, base_model),
        curve=_copy_beside(learning_curve, target),
        video=_copy_beside(video, target),
        results_table=results_rows_markdown(results),
        n_episodes=results.rl.n_episodes,
        denoising_steps=config.get("num_inference_steps", "the configured number of"),
        env_steps=f"{results.env_steps:,}",
        noise=results.noise,
        seed=results.seed,
        sight="constant image (blind control)" if results.blind else "camera image and proprioception",
        minutes=format_minutes(results.minutes),
        other_runs=runs_table(other_runs, markdown=True) if other_runs else "",
        load_from=repo_id or "path/to/this/folder",
        policy_type=config["type"],
        needs_package=config["type"].endswith("_small"),
        procedure=_procedure(results, base_model, dataset),
        reproduce_command=reproduce_command,
        versions=", ".join(f"{package} {version}" for package, version in results.versions.items()) or "not recorded",
        limits="\n".join(f"- {limit}" for limit in [*limits, *_limits(results, base_model)]),
    )
    path = target / CARD_NAME
    partial = target / f".{CARD_NAME}.partial"
    partial.write_text(str(card), encoding="utf-8")
    _check_metadata(partial, results)
    os.replace(partial, path)
    return path


def _card_data(
    results: RunResults, env_name: str, title: str, base_model: str | None, dataset: str | None, license: str
) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    tasks: dict[str, TaskSummary] = {env_name: results.rl, **summary_parts(results.rl)}
    evaluations = [
        EvalResult(
            task_type="robotics",
            task_name="Robotic manipulation",
            dataset_type=name,
            dataset_name=name,
            metric_type="success_rate",
            metric_name=f"Success rate over {summary.n_episodes} fixed initial states (95 %: "
            f"{summary.ci95[0]:.2f} to {summary.ci95[1]:.2f})",
            metric_value=round(summary.success_rate, 4),
        )
        for name, summary in tasks.items()
    ]
    return ModelCardData(
        model_name=title,
        library_name="lerobot",
        pipeline_tag="robotics",
        license=license,
        tags=[*TAGS, _algorithm(results).lower()],
        base_model=base_model,
        datasets=dataset,
        eval_results=evaluations,
    )


def _summary(results: RunResults, config: dict[str, Any], env_name: str, base_model: str | None) -> str:
    start = (
        f"it starts from [{base_model}](https://huggingface.co/{base_model})"
        if base_model
        else "it first imitated scripted demonstrations"
    )
    before, after = f"**{results.sft.success_rate:.3f}**", f"**{results.rl.success_rate:.3f}**"
    outcome = (
        f"Success rose from {before} to {after}."
        if results.gain > 0
        else f"Success went from {before} to {after}: reinforcement learning did not help in this run."
    )
    return (
        f"A flow-matching vision-language-action policy (LeRobot type `{config['type']}`) for `{env_name}`: {start} "
        f"and then learned by {_algorithm(results)} with {results.noise} exploration "
        f"([πRL](https://arxiv.org/abs/2510.25889)) from {_reward(results)}. {outcome}"
    )


def _procedure(results: RunResults, base_model: str | None, dataset: str | None) -> str:
    data = f"`{dataset}`" if dataset else "demonstrations of scripted experts with noise, successful episodes only"
    first = f"Start: `{base_model}`." if base_model else f"Imitation with lerobot-train from {data}."
    config = results.config
    rank = config.get("lora_rank", 0)
    vlm = f"vision-language model adapted by LoRA of rank {rank} (merged into these weights)" if rank else ""
    critic = " and a critic" if _algorithm(results) == "PPO" else ""
    return (
        f"{first} Then {_algorithm(results)} with {results.noise}: {vlm or 'vision-language model frozen'}, action "
        f"expert{critic} trained on {results.env_steps:,} environment steps with {_reward(results)}."
    )


def _algorithm(results: RunResults) -> str:
    return str(results.config.get("algorithm", "PPO"))


def _reward(results: RunResults) -> str:
    kind = results.config.get("env_options", {}).get("reward", "success")
    return "a reward of 1 at success and 0 otherwise" if kind == "success" else f"the environment's {kind} reward"


def _limits(results: RunResults, base_model: str | None) -> list[str]:
    limits = [] if base_model else list(_SMALL_LIMITS)
    return [*([_BLIND_LIMIT] if results.blind else []), *limits, *_SIMULATION_LIMITS]


def _policy_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a saved LeRobot policy.")
    return json.loads(file.read_text(encoding="utf-8"))


def _copy_beside(source: str | Path | None, folder: Path) -> str:
    """Copies a picture or video next to the card, unless it is there; returns its file name."""
    if source is None:
        return ""
    file = Path(source)
    if not file.is_file():
        raise ValueError(f"{file} does not exist; make it before the card or leave it out.")
    if file.resolve().parent != folder.resolve():
        shutil.copyfile(file, folder / file.name)
    return file.name


def _check_metadata(path: Path, results: RunResults) -> None:
    """Reloads the card: what the Hub will read must be the run's numbers (no network needed)."""
    from huggingface_hub import ModelCard

    loaded = ModelCard.load(path).data.eval_results
    if not loaded or loaded[0].metric_value != round(results.rl.success_rate, 4):
        path.unlink()
        raise ValueError("The card's metadata does not hold the evaluation; a title or name may break the YAML.")
