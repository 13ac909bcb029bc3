"""From nothing to a policy that improves: demonstrations, few-shot SFT, baseline, RL, results.

The recipes are this pipeline with different settings. Each stage leaves a complete folder or none, so a run that was
killed goes on with the first stage that is missing when the same command is given again.
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pi_rl.arguments import (
    CONFIG_NAME,
    Program,
    changed_settings,
    dump_config,
    launch_command,
    parse_recipe_arguments,
)
from pi_rl.hub.run_record import STAGES_NAME
from pi_rl.progress import Progress, log_beside_progress, say
from pi_rl.recipe_arguments import RecipeArguments

if TYPE_CHECKING:
    from pi_rl.envs.vector_env import EnvSpec
    from pi_rl.trainer.flow_config import FlowConfig
    from pi_rl.trainer.flow_trainer import FlowTrainer

DATASET_ID = "local/demonstrations"


class RecipeError(ValueError):
    """Something that the user of a recipe can put right; the message says how."""


@contextmanager
def _set_up() -> Iterator[None]:
    """Marks what fails in it as the user's to put right, so that a recipe ends with a message, not a traceback."""
    try:
        yield
    except BrokenPipeError:  # whoever read our output has gone: nobody's mistake
        raise
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        raise RecipeError(str(error)) from error


@dataclass
class _Run:
    """One run's settings, folder and minutes per stage; ``before`` are those of an earlier, killed process."""

    recipe: RecipeArguments
    rl: "FlowConfig"
    algorithm: str
    command: str
    minutes: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    claimed: bool = False

    def continue_clock(self) -> None:
        """Takes over the stage times of a run that was killed."""
        stages = self.folder / STAGES_NAME
        if stages.exists():
            self.before = json.loads(stages.read_text())
            self.minutes = dict(self.before)

    @property
    def folder(self) -> Path:
        """Where everything of the run is written."""
        return Path(self.rl.output_dir)

    @property
    def is_main(self) -> bool:
        return self.rl.process_index == 0

    @property
    def env_options(self) -> dict[str, Any]:
        return {**self.recipe.env_options, **({"blind": True} if self.recipe.blind else {})}

    def minutes_of_all(self) -> dict[str, float]:
        """Minutes per stage, and of all that no stage covers (imports, loading) since the process began."""
        since_start = (time.time() - psutil.Process().create_time()) / 60
        other = max(0.0, since_start - sum(self.minutes.values()) + sum(self.before.values()))
        return {name: round(value, 2) for name, value in {**self.minutes, "other": other}.items()}

    def wait(self) -> None:
        """Lets the processes catch up with the first."""
        from accelerate import PartialState

        PartialState().wait_for_everyone()

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Announces a stage and takes its time."""
        say(f"\n{title}", enabled=self.is_main)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.minutes[name] = self.minutes.get(name, 0.0) + (time.perf_counter() - started) / 60
            if self.is_main:
                self._write_stages()
        say(f"  {self.minutes[name]:.1f} min", enabled=self.is_main)

    def _write_stages(self) -> None:
        partial = self.folder / f".{STAGES_NAME}.new"
        partial.write_text(json.dumps(self.minutes) + "\n")
        partial.replace(self.folder / STAGES_NAME)


def recipe_main(
    description: str,
    default_config: Path | None,
    noise: str,
    argv: Sequence[str] | None = None,
    *,
    output_dir: str = "outputs/run",
    algorithm: str = "ppo",
    program: Program | None = None,
) -> None:
    """:func:`run_recipe` as a program.

    Exit codes: 0 done, 2 something that the user can put right (printed in one paragraph), 75 ended by a signal with
    its state saved, 1 anything else.
    """
    log_beside_progress()
    try:
        run_recipe(
            description, default_config, noise, argv, output_dir=output_dir, algorithm=algorithm, program=program
        )
    except RecipeError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from pi_rl.trainer.processes import leave_process_group

    leave_process_group()


def run_recipe(
    description: str,
    default_config: Path | None,
    noise: str,
    argv: Sequence[str] | None = None,
    *,
    output_dir: str = "outputs/run",
    algorithm: str = "ppo",
    program: Program | None = None,
) -> Path:
    """Runs a recipe from its command line.

    Args:
        description: Text of ``--help``.
        default_config: YAML file used when no ``--config`` is given.
        noise: Exploration noise, unless a file or the command line says otherwise.
        argv: Arguments; the process's by default.
        output_dir: The run's folder, unless a file or the command line says otherwise.
        algorithm: "ppo" or "grpo".
        program: The command that runs the recipe, where it is not a script in ``recipes/``.

    Returns:
        The run's output folder.

    Raises:
        RecipeError: On bad options, an output folder of another run, parts that do not fit, or a full disk.
        SystemExit: With code 75, when a signal ended the run; what was complete is kept.
    """
    import torch

    from pi_rl.envs.registry import check_name_and_options

    arguments = list(sys.argv[1:] if argv is None else argv)
    with _set_up():
        recipe, config = parse_recipe_arguments(
            (RecipeArguments, _config_class(algorithm)),
            default_config=default_config,
            defaults={"noise": noise, "output_dir": output_dir},
            description=description,
            argv=arguments,
            program=program,
        )
    if config.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # small models lose more than they gain by threads, and simulators want the cores
    run = _Run(
        recipe,
        config,
        algorithm,
        launch_command(program or f"recipes/{Path(sys.argv[0]).name}", arguments),
    )
    with _set_up():
        spec = check_name_and_options(recipe.env, run.env_options)
        _check_together(recipe, config, spec)
        _prepare_folder(run)
    run.continue_clock()
    say(config.arithmetic, enabled=run.is_main)
    try:
        with _saved(run):
            _run_stages(run, spec)
    except BaseException:
        _release_folder(run)
        raise
    return run.folder


@contextmanager
def _saved(run: _Run) -> Iterator[None]:
    """What a run that saves its state says in the end: how it goes on, or what the user can put right.

    Raises:
        SystemExit: With code 75 where a signal ended it, in whatever stage.
        RecipeError: Where a checkpoint cannot be read or written.
    """
    from pi_rl.trainer.checkpoint_folders import CheckpointError
    from pi_rl.trainer.disk import NotWritten
    from pi_rl.trainer.processes import leave_process_group
    from pi_rl.trainer.stop_signals import SAVED_EXIT_CODE, Preempted, SavedInterrupt, ending_on_signals

    try:
        with ending_on_signals(announce=run.is_main):
            yield
    except (CheckpointError, NotWritten) as error:
        raise RecipeError(str(error)) from error
    except (Preempted, SavedInterrupt):
        run.claimed = run.rl.dry_run  # the folder stays, for the command to go on with
        say(f"Go on with the run: {_resume_command(run)}", enabled=run.is_main and not run.rl.dry_run)
        leave_process_group()
        raise SystemExit(SAVED_EXIT_CODE) from None


def _resume_command(run: _Run) -> str:
    rest = f"train --resume {shlex.quote(str(run.folder))}"
    if run.rl.world_size == 1:
        return f"pi-rl {rest}"
    return f"`accelerate launch` with the options that you gave it, then -m pi_rl {rest}"


def _run_stages(run: _Run, spec: "EnvSpec") -> None:
    """All stages; what the first process has made or was given, others get from it."""
    from pi_rl.trainer.processes import first_decides, reachable

    policy_path: str | Path = run.recipe.model or run.folder / ("init" if run.rl.dry_run else "sft")
    if str(policy_path).startswith("~"):
        policy_path = Path(policy_path).expanduser()
    if run.recipe.model is None:
        make = _create_small_policy if run.rl.dry_run else _make_sft_policy
        first_decides(lambda: make(run, spec))
    if first_decides(lambda: Path(policy_path).is_dir()):
        with reachable(policy_path, run.rl.device) as folder:
            _reinforce(run, folder)
    else:  # a Hub id, which every computer downloads for itself
        _reinforce(run, policy_path)


def _config_class(algorithm: str) -> "type[FlowConfig]":
    from pi_rl.trainer.flow_grpo_config import FlowGRPOConfig
    from pi_rl.trainer.flow_ppo_config import FlowPPOConfig

    return {"ppo": FlowPPOConfig, "grpo": FlowGRPOConfig}[algorithm]


def _trainer_class(algorithm: str) -> "type[FlowTrainer]":
    from pi_rl.trainer.flow_grpo_trainer import FlowGRPOTrainer
    from pi_rl.trainer.flow_ppo_trainer import FlowPPOTrainer

    return {"ppo": FlowPPOTrainer, "grpo": FlowGRPOTrainer}[algorithm]


def _check_together(recipe: RecipeArguments, rl: "FlowConfig", spec: "EnvSpec") -> None:
    """What would otherwise be found only after demonstrations and SFT."""
    from pi_rl.rollout.evaluator import evaluation_ids

    if not spec.cameras and (recipe.model is None or recipe.video):
        raise ValueError(
            f"{spec.name} has no cameras: give a policy with --model (see pi_rl.policies.mlp.create), and --no_video."
        )
    if recipe.model is None and (rl.n_action_steps or 1) > recipe.chunk_size:
        raise ValueError(
            f"n_action_steps={rl.n_action_steps} is more than the chunk_size={recipe.chunk_size} actions that the "
            "policy predicts; lower the one or raise the other."
        )
    if rl.planned_eval_episodes:
        evaluation_ids(spec, rl.planned_eval_episodes)


def _prepare_folder(run: _Run) -> None:
    """Claims the output folder, or continues the same run in it; refuses another run's."""
    from pi_rl.hub.results import RESULTS_NAME
    from pi_rl.trainer.checkpoint_folders import clean_up
    from pi_rl.trainer.disk import check_output_folder
    from pi_rl.trainer.processes import first_decides

    config = run.folder / CONFIG_NAME

    def claim() -> None:
        finished = RESULTS_NAME if run.rl.planned_eval_episodes else "trainer_state.json"
        if (run.folder / finished).exists():
            raise ValueError(
                f"{run.folder} holds a finished run ({finished} is there). Give another --output_dir, or delete it."
            )
        if run.rl.resume_from_checkpoint is not None:
            _check_beginning(Path(run.rl.resume_from_checkpoint), run.folder)
        run.claimed = not config.exists()
        check_output_folder(run.folder)
        changed = changed_settings((run.recipe, run.rl), config)
        # a run that was moved, or is named from elsewhere, is the same run
        if changed := [line for line in changed if not line.startswith("output_dir:")]:
            raise ValueError(
                f"{run.folder} holds a run with other settings ({'; '.join(changed[:6])}). Give another --output_dir, "
                "delete the folder, or repeat the command of that run to continue it."
            )
        if run.claimed and any(run.folder.iterdir()):
            raise ValueError(f"{run.folder} is not empty and holds no run of pi_rl. Give another --output_dir.")
        dump_config((run.recipe, run.rl), config)
        clean_up(run.folder)

    first_decides(claim)


def _check_beginning(checkpoint: Path, folder: Path) -> None:
    """Refuses a checkpoint that cannot be resumed, and one of the run's own: the run goes on from its newest.

    Raises:
        ValueError: Saying why.
    """
    from pi_rl.trainer.checkpoint_folders import check_checkpoint

    check_checkpoint(checkpoint)
    if checkpoint.resolve().parent == folder.resolve():
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} is of the run in {folder} itself, which goes on from its newest "
            "checkpoint without that option. To begin again from an earlier one, give another --output_dir."
        )


def _release_folder(run: _Run) -> None:
    """Leaves nothing behind when a run failed before its first stage was complete."""
    beginnings = {CONFIG_NAME, "init", STAGES_NAME}
    if (
        run.is_main
        and run.claimed
        and run.folder.is_dir()
        and {entry.name for entry in run.folder.iterdir()} <= beginnings
    ):
        shutil.rmtree(run.folder / "init", ignore_errors=True)
        for name in (CONFIG_NAME, STAGES_NAME):
            (run.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # a mount point or another program's working folder stays, empty
            run.folder.rmdir()


def _make_sft_policy(run: _Run, spec: "EnvSpec") -> None:
    """Demonstrations and few-shot SFT of a small policy, on the main process."""
    from pi_rl.demonstrations import collect_demonstrations
    from pi_rl.envs.registry import make_env
    from pi_rl.envs.workers import available_cores
    from pi_rl.trainer.sft import run_sft

    recipe, rl, folder = run.recipe, run.rl, run.folder
    if (folder / "sft").is_dir():
        say(f"\nUsing the fine-tuned policy in {folder / 'sft'}.")
        return
    workers = rl.env_workers or available_cores()
    with run.stage("demonstrations", f"1. Demonstrations: scripted experts in {recipe.env}"):
        with _set_up():
            init = _create_small_policy(run, spec)
            opened = make_env(recipe.env, workers, workers, **run.env_options)
        with opened as env:
            if not (folder / "demos").is_dir():
                summary = collect_demonstrations(
                    env,
                    episodes_per_task=recipe.demos_per_task,
                    output_dir=folder / "demos",
                    repo_id=DATASET_ID,
                    noise_std=recipe.demo_noise_std,
                    noise_rho=recipe.demo_noise_rho,
                    noise_window=recipe.demo_noise_window,
                    max_speed=recipe.demo_max_speed,
                    max_steps=recipe.demo_max_steps,
                    trailing_steps=recipe.demo_trailing_steps,
                    seed=rl.seed,
                    progress=Progress("demonstrations", "episode"),
                )
                say(f"  {summary}")
    with run.stage("sft", f"2. Few-shot SFT of a small {recipe.small_model} with lerobot-train"):
        run_sft(
            init,
            folder / "demos",
            DATASET_ID,
            folder / "sft",
            steps=recipe.sft_steps,
            batch_size=recipe.sft_batch_size,
            learning_rate=recipe.sft_learning_rate,
            seed=rl.seed,
            device=rl.device.type,
            progress=Progress("SFT", "step"),
        )


def _create_small_policy(run: _Run, spec: "EnvSpec") -> Path:
    """An untrained small policy that fits the environment."""
    from pi_rl.policies.small.create import create_small_policy

    recipe, rl = run.recipe, run.rl
    return create_small_policy(
        recipe.small_model,
        cameras=spec.cameras,
        state_dim=spec.state_dim,
        action_dim=spec.action_dim,
        image_size=recipe.image_resolution,
        chunk_size=recipe.chunk_size,
        n_action_steps=rl.n_action_steps or recipe.chunk_size,
        denoising_steps=rl.denoising_steps,
        instructions=spec.sentences(),
        output_dir=run.folder / "init",
        seed=rl.seed,
        **recipe.small_model_sizes,
    )


def _reinforce(run: _Run, policy_path: str | Path) -> None:
    """Baseline evaluation, RL, final evaluation, results."""
    from pi_rl.run_report import RunLog, report_results

    rl = run.rl
    rl.eval_on_start = False
    with _set_up():
        trainer = _trainer_class(run.algorithm)(
            policy_path, rl, run.recipe.env, run.env_options, peft_config=run.recipe.peft_config()
        )
    trainer.settings = (run.recipe, rl)
    try:
        if rl.dry_run:
            _dry_run(run, trainer)
            return
        if run.is_main:
            trainer.add_callback(RunLog(run.folder, run.recipe.env))
        evaluated = rl.eval_episodes > 0
        if evaluated:
            with run.stage("baseline", f"3. Baseline: deterministic policy on {rl.eval_episodes} fixed states"):
                trainer.evaluate()
                before = trainer.last_evaluation
        with run.stage("rl", f"4. RL: {run.algorithm.upper()} with {rl.noise}, {rl.num_iterations} iterations"):
            # the first process's choice counts; others need not have the folder
            trainer.train(resume_from_checkpoint=_checkpoint_to_resume(run) if run.is_main else None)
        trainer.save_model(str(run.folder / "policy"), _internal_call=True)  # the push waits for card and results
        if run.is_main:
            trainer.state.save_to_json(str(run.folder / "trainer_state.json"))
        if evaluated:
            with run.stage("evaluation", "5. Result: the same states again"):
                trainer.evaluate()
            if run.is_main:
                report_results(run, trainer, policy_path, before, trainer.last_evaluation)
        run.wait()
        if rl.push_to_hub:
            trainer.push_saved(run.folder)
    finally:
        trainer.close()


def _dry_run(run: _Run, trainer: Any) -> None:
    try:
        trainer.train()
        trainer.save_model(str(run.folder / "policy"))
        run.wait()
        if run.is_main:
            saved = sum(file.stat().st_size for file in (run.folder / "policy").iterdir()) / 1e6
            say(f"\nDry run finished: one chunk, one update, one save ({saved:.1f} MB, deleted again).")
    finally:
        if run.is_main:
            shutil.rmtree(run.folder)


def _checkpoint_to_resume(run: _Run) -> str | None:
    """The newest readable checkpoint of the run, or the one that it was told to begin with."""
    from pi_rl.trainer.checkpoint_folders import newest_checkpoint

    own = newest_checkpoint(run.folder)
    return run.rl.resume_from_checkpoint if own is None else str(own)
