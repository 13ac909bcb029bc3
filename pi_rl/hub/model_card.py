"""The model card of a trained policy: YAML metadata with the evaluation, numbers, pictures, limits, command."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pi_rl.__about__ import simulator_of
from pi_rl.hub.card import (
    OWN_TYPES,
    PAPER,
    card_metadata,
    copy_beside,
    evaluation_results,
    fenced,
    license_metadata,
    license_sentence,
    policy_config,
    save_card,
    start_of,
    version_lines,
)
from pi_rl.hub.results import (
    RunResults,
    format_minutes,
    results_rows_markdown,
    runs_table,
    short_name,
    summary_parts,
)

SMALL_LIMITS = (
    "A very small network, trained from random weights for a demonstration; it knows no other task, object or scene.",
    "Its tokenizer was trained on the instructions of its own tasks; other wordings carry no meaning for it.",
)
SIMULATION_LIMITS = (
    "Simulation only: it has never seen a real robot and must not drive one.",
    "Initial states come from the object range in the run's configuration; elsewhere success is unknown.",
)
_ONE_SEED = (
    "One training seed per checkpoint: the interval covers the evaluation episodes, not the spread between seeds."
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
    configuration: str = "",
    learning_curve: str | Path | None = None,
    video: str | Path | None = None,
    other_runs: Sequence[RunResults] = (),
    limits: Sequence[str] = (),
    repo_id: str | None = None,
) -> Path:
    """Writes ``README.md`` into a policy folder and copies the picture and the film beside it.

    Access tokens and folders of this machine never reach the card.

    Args:
        folder: LeRobot policy folder; ``config.json`` tells the policy type and the denoising steps.
        results: Numbers of the run.
        env_name: Environment, for example ``"metaworld:handle-press-v3"``.
        reproduce_command: Command line that repeats the run.
        base_model: Hub id or local folder of the policy the run started from; None for a small policy trained from
            random weights. Of a folder, the base policy and licence in its own card are taken over.
        dataset: Hub id of the demonstrations, if they are published.
        license: Licence of the weights; None or "other" takes it from the base policy's card or the policy type.
        title: Heading; by default made of policy type, environment and sampler.
        configuration: The run's YAML, shown folded.
        learning_curve: PNG shown at the top.
        video: MP4 shown at the top.
        other_runs: Results of further seeds, for a table of all.
        limits: Further sentences under "Limits".
        repo_id: Hub id of this checkpoint, used in the example and the film's address.

    Returns:
        The card.

    Raises:
        ValueError: If the folder is no policy folder, a picture or film is missing, or the metadata does not survive
            reloading.
    """
    target = Path(folder)
    config = policy_config(target)
    hub_base, stated_license, start = start_of(base_model)
    stated = license if license not in (None, "other") else stated_license
    name = title or f"{config['type']} on {short_name(env_name)}, {results.noise}"
    eval_seed = results.config.get("eval_seed", "not recorded")
    versions = version_lines(results.versions, env_name)
    film = copy_beside(video, target)
    return save_card(
        target,
        "model_card.md",
        card_metadata(
            policy_type=config["type"],
            license=stated,
            tags=["reinforcement-learning", simulator_of(env_name), _algorithm(results).lower()],
            base_model=hub_base,
            dataset=dataset,
            name=name,
            eval_results=_evaluations(results, env_name, config, eval_seed),
        ),
        title=name,
        summary=_summary(results, config, env_name, start),
        curve=copy_beside(learning_curve, target),
        video=film,
        video_address=_address(film, repo_id),
        results_table=results_rows_markdown(results),
        n_episodes=results.rl.n_episodes,
        denoising_steps=config.get("num_inference_steps", "the configured number of"),
        simulator=versions["simulator"],
        env_steps=f"{results.env_steps:,}",
        noise=results.noise,
        seed=results.seed,
        eval_seed=eval_seed,
        sight="constant image (blind control)" if results.blind else "camera image and proprioception",
        minutes=format_minutes(results.minutes),
        other_runs=runs_table(other_runs, markdown=True) if other_runs else "",
        load_from=repo_id or "path/to/this/folder",
        env=env_name,
        policy_type=config["type"],
        needs_package=config["type"].endswith("_small"),
        procedure=_procedure(results, start, dataset),
        reproduce_command=fenced(reproduce_command, "bash"),
        configuration=fenced(configuration, "yaml") if configuration else "",
        versions=versions["packages"],
        limits=[*limits, *_limits(results, config["type"])],
        licence=license_sentence(license_metadata(stated, config["type"])),
    )


def _evaluations(results: RunResults, env_name: str, config: dict[str, Any], eval_seed: Any) -> list[Any]:
    settings = {
        "training_seed": results.seed,
        "evaluation_seed": eval_seed,
        "denoising_steps": config.get("num_inference_steps"),
        "success_before_rl": round(results.sft.success_rate, 4),
    }
    whole, *parts = {env_name: results.rl, **summary_parts(results.rl)}.items()
    shared = {key: value for key, value in settings.items() if key != "success_before_rl"}
    return [
        *evaluation_results(dict([whole]), suite=simulator_of(env_name), settings=settings),
        *evaluation_results(dict(parts), suite=simulator_of(env_name), settings=shared),
    ]


def _address(film: str, repo_id: str | None) -> str:
    """Where the page finds the film: the Hub shows films by their full address."""
    if not film or repo_id is None:
        return film
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo_id, film)


def _summary(results: RunResults, config: dict[str, Any], env_name: str, start: str) -> str:
    before, after = f"**{results.sft.success_rate:.3f}**", f"**{results.rl.success_rate:.3f}**"
    outcome = (
        f"Success rose from {before} to {after}."
        if results.gain > 0
        else f"Success went from {before} to {after}: reinforcement learning did not help in this run."
    )
    return (
        f"A flow-matching vision-language-action policy (LeRobot type `{config['type']}`) for `{env_name}`. It starts "
        f"from {start} and then learned by {_algorithm(results)} with {results.noise} exploration ([πRL]({PAPER})) "
        f"from {_reward(results)}. {outcome}"
    )


def _procedure(results: RunResults, start: str, dataset: str | None) -> str:
    data = f"`{dataset}`" if dataset else "demonstrations of scripted experts with noise, successful episodes only"
    made_here = results.config.get("model") is None
    first = f"Imitation with lerobot-train from {data}." if made_here else f"Start: {start}."
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


def _limits(results: RunResults, policy_type: str) -> list[str]:
    limits = list(SMALL_LIMITS) if policy_type in OWN_TYPES else []
    return [*([_BLIND_LIMIT] if results.blind else []), *limits, *SIMULATION_LIMITS, _ONE_SEED]
