"""Checkpoints of a run: a LeRobot policy folder beside the Trainer's state, written aside and renamed."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from pi_rl.__about__ import __version__
from pi_rl.arguments import CONFIG_NAME, dump_config
from pi_rl.checkpoint_order import RL_STATE_NAME, checkpoints, save_of
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.checkpoints import LoadedPolicy, load_heads, load_policy_weights, save_heads, save_policy
from pi_rl.policies.lora import has_lora
from pi_rl.trainer.checkpoint_folders import (
    FORMAT,
    STAGING_NAME,
    CheckpointError,
    check_checkpoint,
    clean_up,
    discard_staged,
    newest_checkpoint,
    publish,
    remove_old,
)
from pi_rl.trainer.disk import NotWritten, checkpoint_bytes, warn_about_low_disk, why_not_written
from pi_rl.trainer.flow_config import FlowConfig
from pi_rl.trainer.optimizer_fit import check_optimizer_fits, check_schedule_fits
from pi_rl.trainer.plain_state import (
    generator_states,
    read_json,
    read_optimizer,
    read_scheduler,
    restore_generators,
    rng_file,
    write_json,
    write_optimizer,
    write_scheduler,
)
from pi_rl.trainer.processes import all_succeed, first_decides, process_count, reachable
from pi_rl.trainer.resumed_settings import keep_settings
from pi_rl.trainer.sharding import (
    ShardedTrainer,
    is_sharded,
    load_whole_optimizer_state,
    whole_optimizer_state,
    whole_state,
)

logger = logging.getLogger(__name__)
POLICY_PREFIX = "policy.policy."
"""Where the LeRobot policy's tensors are in the state dict of the trained module."""


@dataclasses.dataclass(frozen=True)
class IterationEnd:
    """What a checkpoint of the last completed iteration needs beside weights and optimiser.

    Attributes:
        step: Optimiser steps made.
        epoch: The Trainer's fractional epoch.
        rl_state: Counters.
        generators: Of this process.
        scheduler: State of the learning-rate schedule.
    """

    step: int
    epoch: float
    rl_state: dict[str, Any]
    generators: dict[str, Any]
    scheduler: dict[str, Any]


class CheckpointedTrainer(ShardedTrainer):
    """Saves and resumes policy, heads and counters.

    The first process writes everything, in the form that a single process writes, whether the model is sharded or
    not. So only its output folder has to outlive the run, and a checkpoint can be resumed sharded or unsharded.
    Subclasses set ``_loaded`` and the counters, and may add to :meth:`rl_state`.

    Attributes:
        settings: Dataclasses whose options go into a checkpoint's pi_rl_config.yaml: the configuration, before it a
            recipe's arguments.
        failed_saves: Checkpoints of this run that could not be written.
    """

    args: FlowConfig
    lr_scheduler: Any
    _created_lr_scheduler: bool
    _loaded: LoadedPolicy
    algorithm: str
    settings: tuple[Any, ...] = ()
    env_steps: int = 0
    episodes: int = 0
    failed_saves: int = 0
    _start: str | None = None
    _staging: Path | None = None
    _last_end: IterationEnd | None = None
    _saved_step: int | None = None
    _save_number: int = 0  # number of the last one, counted over all branches of the run

    @property
    def actor_critic(self) -> FlowActorCritic:
        """The module inside any distributed wrapper."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def iteration(self) -> int:
        """Number of the current iteration, from 0."""
        return self.state.global_step // self.args.updates_per_iteration

    def rl_state(self) -> dict[str, Any]:
        """What a resumed run needs beside weights and optimiser, and where it began; plain values, written as JSON."""
        return {
            "format": FORMAT,
            "pi_rl": __version__,
            "algorithm": self.algorithm,
            "start": self._start or self._loaded.origin,
            "env_steps": self.env_steps,
            "episodes": self.episodes,
            "iteration": self.iteration,
        }

    def load_rl_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`rl_state` wrote."""
        self.env_steps, self.episodes = state["env_steps"], state["episodes"]
        self._start = state.get("start")

    # ---- resuming --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; a checkpoint to resume has to be known to the first process only, which decides for all.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the newest readable one in ``output_dir``.
            *args: Of ``Trainer.train``.
            **kwargs: Of ``Trainer.train``.

        Raises:
            CheckpointError: If the checkpoint cannot be read or is of another run; nothing was loaded then.
        """
        folder = first_decides(lambda: self._folder_to_resume(resume_from_checkpoint))
        if folder is None:
            return super().train(None, *args, **kwargs)
        with reachable(folder, self.args.device) as checkpoint:
            return super().train(str(checkpoint), *args, **kwargs)

    def _folder_to_resume(self, asked: str | bool | None) -> str | None:
        """Also tidies the output folder up; on the first process."""
        root = Path(self.args.output_dir)
        clean_up(root)
        warn_about_low_disk(root, checkpoint_bytes(self.actor_critic), self._checkpoints_at_once())
        if not asked:
            return None
        if asked is not True:
            check_checkpoint(Path(asked))
            return str(asked)
        last = newest_checkpoint(root)
        if last is None:
            raise CheckpointError(
                f"{self.args.output_dir} has no checkpoint to resume; leave resume_from_checkpoint out."
            )
        return str(last)

    def _checkpoints_at_once(self) -> int:
        """How many checkpoints are on the disk at most, the one that is being written included."""
        if self.args.save_strategy == SaveStrategy.NO:
            return 1
        updates = self.args.updates_per_iteration
        every = self.args.save_steps if self.args.save_strategy == SaveStrategy.STEPS else updates
        planned = int(self.args.num_iterations * updates // max(1, every))
        return min(planned, self.args.save_total_limit or planned) + 1

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights, heads and counters of a checkpoint; refuses missing or mismatched tensors."""
        folder = Path(resume_from_checkpoint)
        state = all_succeed(lambda: self._checked_state(folder))
        self.load_rl_state(state)
        self._save_number = save_of(folder) or 0
        self._load_weights(folder)
        if folder.resolve().parent == Path(self.args.output_dir).resolve():
            self._saved_step = read_json(folder / TRAINER_STATE_NAME)["global_step"]

    def _load_weights(self, folder: Path) -> None:
        policy = self._loaded.policy
        gather = is_sharded(self.actor_critic) and has_lora(policy)
        load_policy_weights(policy, folder, whole_state(policy, keep=True) if gather else None)
        load_heads(folder, self.actor_critic)

    def _checked_state(self, folder: Path) -> dict[str, Any]:
        """Counters of a checkpoint, if its iterations, optimiser and schedule are such as this run's."""
        state, trainer_state = check_checkpoint(folder), read_json(folder / TRAINER_STATE_NAME)
        if state["algorithm"] != self.algorithm:
            raise CheckpointError(
                f"The checkpoint is of a {state['algorithm']} run, this one is {self.algorithm}. Resume with that "
                "trainer, or start anew from the folder with model=."
            )
        updates = self.args.updates_per_iteration
        if state["iteration"] * updates != trainer_state["global_step"]:
            raise CheckpointError(
                f"{folder} was written after {state['iteration']} iterations and {trainer_state['global_step']} "
                f"optimiser steps; this run has {updates} optimiser steps per iteration. Resume with the settings "
                "of that run and as many processes (with global_batch_size their number may change)."
            )
        self._check_optimizer(folder)
        return state

    def _check_optimizer(self, folder: Path) -> None:
        """Refuses an optimiser or a schedule of other parameters or kinds than this run's."""
        made_here = self.optimizer is None
        optimizer = self.create_optimizer()
        names = {parameter: name for name, parameter in self.actor_critic.named_parameters()}
        try:
            check_optimizer_fits(folder, optimizer, names)
            check_schedule_fits(folder, len(optimizer.param_groups), self._schedule_of)
        except BaseException:
            if made_here:
                self.optimizer = None  # another try may have other settings
            raise

    def _schedule_of(self, optimizer: torch.optim.Optimizer) -> Any:
        """A schedule such as this run's for another optimiser."""
        own, created = self.lr_scheduler, self._created_lr_scheduler
        self.lr_scheduler = None
        try:
            return self.create_scheduler(int(self.args.num_iterations * self.args.updates_per_iteration), optimizer)
        finally:
            self.lr_scheduler, self._created_lr_scheduler = own, created

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        with keep_settings(self.optimizer, self.lr_scheduler):
            load_whole_optimizer_state(self.optimizer, read_optimizer(folder))
            self.lr_scheduler.load_state_dict(read_scheduler(folder))
        self._load_rng_state(checkpoint)
        self.remember_iteration()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """This process's generators, as far as the checkpoint's run had such a process; last of what is resumed."""
        if checkpoint is None:
            return
        file = Path(checkpoint) / rng_file(self.args.process_index)
        if file.is_file():
            restore_generators(read_json(file))
        else:
            logger.info(f"{checkpoint} is of a run with fewer processes: {file.name} is not in it.")

    def _load_best_model(self) -> None:
        best = first_decides(lambda: self.state.best_model_checkpoint)
        if best is not None:
            with reachable(best, self.args.device) as folder:
                self._load_weights(folder)

    # ---- the last completed iteration ------------------------------------------------------------------------------

    def remember_iteration(self) -> None:
        """Called when an iteration is complete: keeps what :meth:`rewind` needs."""
        self._last_end = IterationEnd(
            self.state.global_step,
            self.state.epoch or 0.0,
            self.rl_state(),
            generator_states(),
            self.lr_scheduler.state_dict(),
        )

    def rewind(self) -> None:
        """Sets counters, generators and schedule back to the end of the last completed iteration.

        Weights and optimiser stay as they are: a rollout or evaluation has not changed them.
        """
        end = self._last_end
        if end is None:
            raise RuntimeError("No iteration is complete.")
        self.state.global_step, self.state.epoch = end.step, end.epoch
        self.load_rl_state(end.rl_state)
        restore_generators(end.generators)
        self.lr_scheduler.load_state_dict(end.scheduler)
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    # ---- saving ----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the policy folder; all processes call it, the first writes.

        Args:
            output_dir: The folder; the run's by default.
            _internal_call: Of ``Trainer.save_model``; nothing here depends on it.

        Raises:
            NotWritten: If the disk refuses; on all processes.
        """
        sharded = is_sharded(self.actor_critic)
        state = whole_state(self.actor_critic, keep=self.args.process_index == 0) if sharded else None
        folder = Path(output_dir or self.args.output_dir)
        self._write(folder, lambda: self._save(output_dir, state), half_written=folder)

    def _write(self, folder: Path, write: Callable[[], None], half_written: Path | None = None) -> None:
        """Lets the first process write; what the disk refuses is raised on all of them.

        Args:
            folder: What is written, for the message.
            write: Writes it.
            half_written: Removed if that fails, unless it was there before.
        """

        def attempt() -> str | None:
            new = half_written if half_written is not None and not half_written.exists() else None
            try:
                write()
            except (OSError, SafetensorError) as error:
                if new is not None:
                    shutil.rmtree(new, ignore_errors=True)
                return why_not_written(folder.name, folder.parent, error, checkpoint_bytes(self.actor_critic))
            return None

        problem = first_decides(attempt)
        if problem is not None:
            raise NotWritten(problem)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A LeRobot policy folder plus critic, noise network, counters and settings.

        Args:
            output_dir: The folder.
            state_dict: Whole tensors of a sharded model, as `whole_state` gathers them.
        """
        folder = Path(output_dir or self.args.output_dir)
        module = self.actor_critic
        # the name that a checkpoint written aside will have
        final = Path(self.args.output_dir) / folder.name if folder.parent == self._staging else folder
        save_policy(
            folder,
            self._loaded.policy,
            self._loaded.preprocessor,
            self._loaded.postprocessor,
            state_dict=None if state_dict is None else _below(state_dict, POLICY_PREFIX),
            tokenizer_name=str(final.absolute()),
        )
        save_heads(folder, module, state_dict)
        dump_config(self.settings or (self.args,), folder / CONFIG_NAME)
        write_json(folder / RL_STATE_NAME, self.rl_state())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint of the run; one in its middle that the disk refuses is a warning, the last one an error."""
        try:
            self.write_checkpoint()
        except NotWritten as error:
            self.failed_saves += 1
            if self.state.global_step >= self.state.max_steps:
                raise
            if self.args.process_index == 0:
                logger.warning(
                    f"{error} Earlier checkpoints are intact and training goes on; checkpoints that failed so far: "
                    f"{self.failed_saves}."
                )

    def write_checkpoint(self, *, delete_old: bool = True) -> Path:
        """Writes a checkpoint aside and renames it, so that a killed process never leaves half of one.

        A collective call.

        Args:
            delete_old: Whether checkpoints beyond ``save_total_limit`` are deleted.

        Returns:
            The folder, which the first process has.

        Raises:
            NotWritten: If the disk refuses, on all processes; what was begun is removed.
        """
        root = Path(self.args.output_dir)
        final = root / f"checkpoint-{self.state.global_step}"
        self._staging = root / STAGING_NAME
        self.store_flos()
        best = self.state.best_model_checkpoint
        self._name_best_checkpoint(root)
        try:
            self._write_parts(self._staging / final.name, root)
        except BaseException:
            self.state.best_model_checkpoint = best
            if self.args.process_index == 0:
                discard_staged(root)
            raise
        finally:
            self._staging = None
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if delete_old and self.args.process_index == 0:
            remove_old(root, self.args.save_total_limit, final, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        return final

    def checkpoint_of_last_iteration(self, *, delete_old: bool = True) -> Path:
        """The checkpoint of the last completed iteration, written if there is none; after :meth:`rewind`.

        A collective call.

        Args:
            delete_old: Whether checkpoints beyond ``save_total_limit`` are deleted.

        Raises:
            NotWritten: If the disk refuses.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

        def is_there() -> bool:
            try:
                check_checkpoint(folder)
            except CheckpointError:
                return False
            return self._saved_step == self.state.global_step

        return folder if first_decides(is_there) else self.write_checkpoint(delete_old=delete_old)

    def _write_parts(self, staged: Path, root: Path) -> None:
        """Policy, optimiser, generators, Trainer's state; the list of files last."""
        final, first = root / staged.name, self.args.process_index == 0
        self._write(final, lambda: discard_staged(root))
        self.save_model(str(staged), _internal_call=True)
        if is_sharded(self.actor_critic):
            optimizer = whole_optimizer_state(self.optimizer, keep=first)
        else:
            optimizer = self.optimizer.state_dict() if first else {}
        self._write(final, lambda: write_optimizer(staged, optimizer))
        generators: list[Any] = [generator_states()]
        if process_count() > 1:
            own, generators = generators[0], [None] * process_count()
            dist.all_gather_object(generators, own)

        def finish() -> None:
            write_scheduler(staged, self.lr_scheduler.state_dict())
            for rank, states in enumerate(generators):
                write_json(staged / rng_file(rank), states)
            self._update_callback_states()
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            names = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
            save = 1 + max([self._save_number, *(save_of(folder) or 0 for folder in checkpoints(root))])
            write_json(staged / RL_STATE_NAME, {**self.rl_state(), "save": save, "files": names})
            publish(staged, root)
            self._save_number = save

        self._write(final, finish)

    def _update_callback_states(self) -> None:
        """What callbacks and the Trainer's control want to find again; a list where a class has several."""
        states: dict[str, list[Any]] = {}
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: all_ if len(all_) > 1 else all_[0] for name, all_ in states.items()}

    def _name_best_checkpoint(self, root: Path) -> None:
        """The best checkpoint's path, if there is one or this is going to be it."""
        best = self.state.best_global_step
        if best:
            folder = root / f"checkpoint-{best}"
            if first_decides(lambda: folder.is_dir() or best == self.state.global_step):
                self.state.best_model_checkpoint = str(folder)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
