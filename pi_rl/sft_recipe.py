"""Supervised fine-tuning as a recipe: a base model, a few demonstrations, lerobot-train, a policy for RL.

The result, ``output_dir``, is a LeRobot policy folder: what the reinforcement-learning recipes take as ``--model``.
Until it is complete everything lies in ``.NAME.partial`` beside it. A run that a signal ends saves the step that it
is in; it continues from there, and one that was killed from its last checkpoint, when the same command is given again.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi_rl.arguments import Program, changed_settings, dump_config, launch_command, option, parse_recipe_arguments
from pi_rl.hub.push import check_repo_id, push_and_tell
from pi_rl.pipeline import RecipeError
from pi_rl.progress import Progress, say
from pi_rl.trainer.sft import last_checkpoint, launched_rank, run_sft
from pi_rl.trainer.sft_data import check_dataset, choose_episodes
from pi_rl.trainer.sft_launch import first_prepares
from pi_rl.trainer.sft_start import StartSettings, model_folder, start_config, write_start_policy
from pi_rl.trainer.stop_signals import SAVED_EXIT_CODE, ending_on_signals

MODEL, DATA, TRAINING, OUTPUT = "Policy", "Demonstrations", "Training", "Output"
CONFIG_NAME, START_NAME = "sft_config.yaml", "start"
DTYPES = ("float32", "bfloat16")


@dataclass
class SftArguments:
    """Options of the SFT recipe; ``--help`` prints every field's text."""

    model: str = option(
        "lerobot/pi0_base", MODEL, "Hub id or folder of the base policy: π0 or π0.5 as LeRobot stores it"
    )
    model_revision: str | None = option(None, MODEL, "Hub commit, branch or tag of that policy")
    model_license: str = option("other", MODEL, "licence of its weights, for the model card, e.g. gemma")
    expert_only: bool = option(False, MODEL, "train the action expert alone; default: the whole model, as the paper")
    chunk_size: int | None = option(None, MODEL, "H, actions predicted at once; default: the base policy's")
    n_action_steps: int | None = option(None, MODEL, "C, executed actions of them; default: the base policy's")
    denoising_steps: int | None = option(None, MODEL, "K in deployment; default: the base policy's")
    normalization: str | None = option(
        None, MODEL, "of states and actions: mean_std or quantiles; default: the base policy's"
    )
    state_in_prompt: bool | None = option(
        None, MODEL, "π0.5: write the state into the prompt or leave it out; default: the base policy's"
    )

    dataset: str = option("local/demonstrations", DATA, "LeRobotDataset (v3.0): Hub id, or any name with dataset_root")
    dataset_root: str | None = option(None, DATA, "its folder; default: download it")
    dataset_revision: str | None = option(None, DATA, "Hub commit, branch or tag of the dataset")
    episodes: list[int] | None = option(None, DATA, "episodes by number; default: all")
    num_episodes: int | None = option(None, DATA, "draw so many episodes, stratified by task")
    episodes_per_task: int | None = option(None, DATA, "draw so many episodes of each task")
    only_tasks: list[str] = option([], DATA, "instructions to choose from; default: all")
    except_tasks: list[str] = option([], DATA, "instructions to leave out")
    covers_tasks: int | None = option(None, DATA, "stop unless the chosen episodes show exactly so many tasks")
    subset_seed: int = option(0, DATA, "seed of the draw")
    num_workers: int = option(4, DATA, "data-loading processes per process")

    steps: int = option(30_000, TRAINING, "optimiser steps")
    batch_size: int = option(32, TRAINING, "samples per optimiser step over all processes")
    learning_rate: float = option(2.5e-5, TRAINING, "peak learning rate")
    final_learning_rate: float = option(2.5e-6, TRAINING, "learning rate at the end of the cosine decay")
    warmup_steps: int = option(1_000, TRAINING, "steps of linear warm-up")
    weight_decay: float = option(1e-10, TRAINING, "of AdamW")
    adam_beta2: float = option(0.95, TRAINING, "β2 of AdamW")
    grad_clip_norm: float = option(1.0, TRAINING, "gradient-norm clip")
    dtype: str | None = option(None, TRAINING, "type of the weights: float32 or bfloat16; default: the base policy's")
    bf16: bool = option(False, TRAINING, "compute in bfloat16 (autocast), whatever the weights' type")
    gradient_checkpointing: bool = option(False, TRAINING, "recompute activations: less memory, about a third slower")
    seed: int = option(42, TRAINING, "of data order, flow times and noise")
    device: str = option("auto", TRAINING, "cuda, cpu or mps; auto: a GPU if there is one")

    output_dir: str = option("outputs/sft/policy", OUTPUT, "the fine-tuned policy; what RL takes as --model")
    output_dtype: str | None = option(
        None, OUTPUT, "type of its weights: float32 or bfloat16 (RL runs the frozen VLM in it); default: as trained"
    )
    save_every_steps: int = option(1_000, OUTPUT, "checkpoint every N steps, of which the last is kept; 0: never")
    push_to_hub: bool = option(False, OUTPUT, "upload the fine-tuned policy to the Hub at the end")
    hub_model_id: str | None = option(None, OUTPUT, "its repository, user/name; push_to_hub needs it")
    hub_private_repo: bool = option(False, OUTPUT, "make the repository private")
    dry_run: bool = option(False, OUTPUT, "check model and data, print what would be trained, then stop")

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "learning_rate", "grad_clip_norm")
        not_negative = (
            "final_learning_rate",
            "weight_decay",
            "save_every_steps",
            "num_workers",
            "subset_seed",
            "seed",
        )
        rules = {
            **{name: (getattr(self, name) > 0, "above 0") for name in positive},
            **{name: (getattr(self, name) >= 0, "0 or more") for name in not_negative},
            "warmup_steps": (0 <= self.warmup_steps < self.steps, f"0 or more and below steps={self.steps}"),
            "adam_beta2": (0 <= self.adam_beta2 < 1, "at least 0 and below 1"),
            **{
                name: (getattr(self, name) in (None, *DTYPES), " or ".join(DTYPES))
                for name in ("dtype", "output_dtype")
            },
            "device": (self.device in ("auto", "cuda", "cpu", "mps"), "auto, cuda, cpu or mps"),
        }
        for name in ("chunk_size", "n_action_steps", "denoising_steps", "num_episodes", "episodes_per_task"):
            value = getattr(self, name)
            rules[name] = (value is None or value >= 1, "at least 1, or left out")
        for name, (fine, allowed) in rules.items():
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}.")
        if self.push_to_hub:
            check_repo_id(self.hub_model_id or "")

    @property
    def start_settings(self) -> StartSettings:
        """What the policy to train shall be."""
        return StartSettings(
            chunk_size=self.chunk_size,
            n_action_steps=self.n_action_steps,
            denoising_steps=self.denoising_steps,
            normalization=self.normalization,
            state_in_prompt=self.state_in_prompt,
            expert_only=self.expert_only,
            dtype=self.dtype,
            gradient_checkpointing=self.gradient_checkpointing,
        )


@dataclass(frozen=True)
class _Plan:
    """What is going to be trained on what."""

    source: Path
    config: Any
    episodes: list[int]
    tasks: int
    frames: int
    total_episodes: int
    batch_size: int
    device: str

    def describe(self, args: SftArguments, processes: int) -> str:
        """The plan in three lines."""
        what = "action expert only" if args.expert_only else "whole model"
        data = f"{len(self.episodes)} of {self.total_episodes} episodes of {args.dataset}"
        passes = args.steps * args.batch_size / self.frames
        return (
            f"{self.config.type} from {args.model}, {what}, chunks of {self.config.chunk_size} actions\n"
            f"{data}: {self.tasks} tasks, {self.frames} frames\n"
            f"{args.steps} steps x {args.batch_size} samples ({self.batch_size} per process x {processes}) = "
            f"{passes:.1f} passes over the frames"
        )


def work_folder(output: Path) -> Path:
    """Where everything of an unfinished run lies.

    Args:
        output: Its ``output_dir``.
    """
    return output.with_name(f".{output.name}.partial")


def sft_main(
    description: str, default_config: Path | None, argv: Sequence[str] | None = None, *, program: Program | None = None
) -> None:
    """:func:`run_sft_recipe` as a program: what the user can put right is printed in one paragraph, exit code 2."""
    try:
        run_sft_recipe(description, default_config, argv, program=program)
    except RecipeError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run_sft_recipe(
    description: str, default_config: Path | None, argv: Sequence[str] | None = None, *, program: Program | None = None
) -> Path:
    """Fine-tunes a policy as the command line says.

    Under a launcher with several processes all of them train, each on its share of the batch.

    Args:
        description: Text of ``--help``.
        default_config: YAML file used when no ``--config`` is given.
        argv: Arguments; the process's by default.
        program: The command that runs the recipe, where it is not ``recipes/sft.py``.

    Returns:
        The fine-tuned policy's folder.

    Raises:
        RecipeError: If options, model and dataset do not fit together, the output folder is taken, or training fails.
        SystemExit: With code 75, when a signal ended the run; one that came in training has saved the step it was in.
        KeyboardInterrupt: After Ctrl-C before there was anything to go on with.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        (args,) = parse_recipe_arguments(
            (SftArguments,),
            default_config=default_config,
            description=description,
            argv=arguments,
            program=program,
        )
        main, processes = launched_rank() == 0, int(os.environ.get("WORLD_SIZE", "1"))
        output = Path(args.output_dir)
        if main and output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"{output} exists already. Give another --output_dir, or delete it.")
        plan = _make_plan(args, processes)
        say(plan.describe(args, processes), enabled=main)
        if args.dry_run:
            return output
        try:
            with ending_on_signals(announce=main):
                return _train(args, plan, output, main, launch_command(program or "recipes/sft.py", arguments))
        except KeyboardInterrupt:
            if last_checkpoint(work_folder(output)) is None:
                raise
            raise SystemExit(SAVED_EXIT_CODE) from None
    except (ValueError, RuntimeError, OSError) as error:
        raise RecipeError(str(error)) from error


def _make_plan(args: SftArguments, processes: int) -> _Plan:
    """Loads model configuration and dataset metadata, chooses the episodes and checks that all fits."""
    if args.dataset_root is not None and not (Path(args.dataset_root) / "meta" / "info.json").is_file():
        raise ValueError(
            f"There is no LeRobotDataset at dataset_root={args.dataset_root} (meta/info.json is missing)."
        )
    if args.batch_size % processes:
        raise ValueError(f"batch_size={args.batch_size} cannot be shared equally by {processes} processes.")
    import torch
    from lerobot.datasets import LeRobotDatasetMetadata

    source = model_folder(args.model, args.model_revision)
    meta = LeRobotDatasetMetadata(args.dataset, root=args.dataset_root, revision=args.dataset_revision)
    config = start_config(source, meta.features, args.start_settings)
    check_dataset(meta.features, meta.stats or {}, config)
    tasks = [" / ".join(names) for names in meta.episodes["tasks"]]
    chosen = choose_episodes(
        tasks,
        episodes=args.episodes,
        num_episodes=args.num_episodes,
        episodes_per_task=args.episodes_per_task,
        only_tasks=args.only_tasks,
        except_tasks=args.except_tasks,
        covers_tasks=args.covers_tasks,
        seed=args.subset_seed,
    )
    lengths = list(meta.episodes["length"])
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _Plan(
        source=source,
        config=config,
        episodes=chosen,
        tasks=len({tasks[episode] for episode in chosen}),
        frames=sum(lengths[episode] for episode in chosen),
        total_episodes=len(tasks),
        batch_size=args.batch_size // processes,
        device=device,
    )


def _train(args: SftArguments, plan: _Plan, output: Path, main: bool, command: str) -> Path:
    work = work_folder(output)
    first_prepares(lambda: _prepare(work, args, plan))
    if not (work / START_NAME).is_dir():
        raise RuntimeError(
            f"{work / START_NAME} is not here: several machines need an --output_dir that all of them see."
        )
    if (step := _step(work)) and main:
        say(f"Continuing from the checkpoint after step {step}.")
    try:
        run_sft(
            work / START_NAME,
            args.dataset_root,
            args.dataset,
            output,
            steps=args.steps,
            revision=args.dataset_revision,
            episodes=plan.episodes if len(plan.episodes) < plan.total_episodes else None,
            batch_size=plan.batch_size,
            learning_rate=args.learning_rate,
            final_learning_rate=args.final_learning_rate,
            warmup_steps=args.warmup_steps,
            weight_decay=args.weight_decay,
            adam_beta2=args.adam_beta2,
            grad_clip_norm=args.grad_clip_norm,
            seed=args.seed,
            device=plan.device,
            bf16=args.bf16,
            in_memory=False,
            num_workers=args.num_workers,
            work_dir=work,
            save_every_steps=args.save_every_steps,
            join_launcher=True,
            output_dtype=args.output_dtype,
            progress=Progress("SFT", "step", enabled=main),
        )
    except BaseException:
        if main and last_checkpoint(work) is None:
            shutil.rmtree(work, ignore_errors=True)
            say("\nStopped before the first checkpoint: the same command begins anew.")
        elif main:
            say(f"\nStopped; the checkpoint after step {_step(work)} is kept. {_continues(output)} from it.")
        raise
    if main:
        from pi_rl.hub.sft_card import write_sft_card

        write_sft_card(output, args, episodes=plan.episodes, tasks=plan.tasks, frames=plan.frames, command=command)
        shutil.rmtree(work)
        say(f"\nFine-tuned policy: {output}\nReinforcement learning starts from it with --model {output}")
        if args.push_to_hub:
            assert args.hub_model_id is not None
            push_and_tell(output, args.hub_model_id, private=args.hub_private_repo or None)
    return output


def _prepare(work: Path, args: SftArguments, plan: _Plan) -> None:
    """Settings, start policy and data, on the first process."""
    from pi_rl.trainer.checkpoint_folders import remove_leftovers

    _claim(work, args)
    output = Path(args.output_dir)
    remove_leftovers(output.parent, output.name)
    if not (work / START_NAME).is_dir():
        write_start_policy(work / START_NAME, plan.source, plan.config, args.start_settings)
    _download(args, plan)


def _claim(work: Path, args: SftArguments) -> None:
    """Writes the run's settings into its work folder; refuses a checkpoint of a run with others."""
    work.mkdir(parents=True, exist_ok=True)
    changed = changed_settings((args,), work / CONFIG_NAME)
    if changed := [line for line in changed if not line.startswith("output_dir:")]:
        if last_checkpoint(work) is not None:
            raise ValueError(
                f"{work} holds an unfinished run with other settings ({'; '.join(changed[:6])}). "
                "Give another --output_dir, delete the folder, or repeat the command of that run to continue it."
            )
        shutil.rmtree(work / START_NAME, ignore_errors=True)
    dump_config((args,), work / CONFIG_NAME)


def _download(args: SftArguments, plan: _Plan) -> None:
    """Fetches the episodes with a progress bar, before the training process, whose output is not shown."""
    if args.dataset_root is not None:
        return
    from lerobot.datasets import LeRobotDataset

    LeRobotDataset(args.dataset, episodes=plan.episodes, revision=args.dataset_revision, video_backend="pyav")


def _continues(output: Path) -> str:
    """What continues an unfinished run; under a launcher its options belong to the command too."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "The same command continues"
    return f"The same command, or pi-rl sft --resume {shlex.quote(str(output))}, continues"


def _step(work: Path) -> int:
    """Optimiser steps of the last checkpoint; 0 without one."""
    last = last_checkpoint(work)
    return 0 if last is None else int(last.name)
