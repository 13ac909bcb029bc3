"""Checkpoints of a run: a LeRobot policy folder beside the Trainer's files, written aside and renamed."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.checkpoints import LoadedPolicy, load_heads, load_policy_weights, save_heads, save_policy
from pi_rl.policies.lora import has_lora
from pi_rl.trainer.flow_config import FlowConfig
from pi_rl.trainer.processes import all_succeed, first_decides, process_count, reachable
from pi_rl.trainer.sharding import (
    ShardedTrainer,
    is_sharded,
    load_whole_optimizer_state,
    whole_optimizer_state,
    whole_state,
)

RL_STATE_NAME = "rl_state.json"
POLICY_PREFIX = "policy.policy."
"""Where the LeRobot policy's tensors are in the state dict of the trained module."""


class CheckpointedTrainer(ShardedTrainer):
    """Saves and resumes policy, heads and counters.

    The first process writes everything, in the form that a single process writes, whether the model is sharded or
    not. So only its output folder has to outlive the run, and a checkpoint can be resumed sharded or unsharded.
    Subclasses set ``_loaded`` and the counters, and may add to :meth:`rl_state`.
    """

    args: FlowConfig
    _loaded: LoadedPolicy
    algorithm: str
    _checkpoint_root: str | None = None
    env_steps: int = 0
    episodes: int = 0

    @property
    def actor_critic(self) -> FlowActorCritic:
        """The module inside any distributed wrapper."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def iteration(self) -> int:
        """Number of the current iteration, from 0."""
        return self.state.global_step // self.args.updates_per_iteration

    def rl_state(self) -> dict[str, Any]:
        """What a resumed run needs beside weights and optimiser; plain numbers, written as JSON."""
        return {
            "algorithm": self.algorithm,
            "env_steps": self.env_steps,
            "episodes": self.episodes,
            "iteration": self.iteration,
        }

    def load_rl_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`rl_state` wrote."""
        if state["algorithm"] != self.algorithm:
            raise ValueError(
                f"The checkpoint is of a {state['algorithm']} run, this one is {self.algorithm}. Resume with that "
                "trainer, or start anew from the folder with model=."
            )
        self.env_steps, self.episodes = state["env_steps"], state["episodes"]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; a checkpoint to resume has to be known to the first process only, which decides for all.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last one in ``output_dir``.
            *args: Of ``Trainer.train``.
            **kwargs: Of ``Trainer.train``.
        """
        folder = first_decides(lambda: self._folder_to_resume(resume_from_checkpoint))
        if folder is None:
            return super().train(None, *args, **kwargs)
        with reachable(folder, self.args.device) as checkpoint:
            return super().train(str(checkpoint), *args, **kwargs)

    def _folder_to_resume(self, asked: str | bool | None) -> str | None:
        if not asked:
            return None
        if asked is not True:
            return str(asked)
        last = get_last_checkpoint(self.args.output_dir)
        if last is None:
            raise ValueError(f"{self.args.output_dir} has no checkpoint to resume; leave resume_from_checkpoint out.")
        return last

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the policy folder; all processes call it, the first writes."""
        if not is_sharded(self.actor_critic):
            super().save_model(output_dir, _internal_call)
            return
        state = whole_state(self.actor_critic, keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.actor_critic):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or (process_count() == 1 and not is_sharded(self.actor_critic)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # mapped, not read, where it is copied to a GPU: a sharded process needs its part of each tensor only
        mapped = self.args.device.type != "cpu"
        optimizer, scheduler = (
            torch.load(os.path.join(checkpoint, name), map_location="cpu", weights_only=True, mmap=mapped)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        load_whole_optimizer_state(self.optimizer, optimizer)
        self.lr_scheduler.load_state_dict(scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        """Every process's generators, in files that the first process writes."""
        if process_count() == 1:
            super()._save_rng_state(output_dir)
            return
        name = f"rng_state_{self.args.process_index}.pth"
        with tempfile.TemporaryDirectory() as own:
            super()._save_rng_state(own)
            content = (Path(own) / name).read_bytes()
        contents: list[Any] = [None] * process_count()
        dist.all_gather_object(contents, (name, content))
        if self.args.should_save:
            for other, state in contents:
                (Path(output_dir) / other).write_bytes(state)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A LeRobot policy folder plus critic, noise network and counters.

        Args:
            output_dir: The folder.
            state_dict: Whole tensors of a sharded model, as `whole_state` gathers them.
        """
        folder = Path(output_dir or self.args.output_dir)
        module = self.actor_critic
        # the name that a checkpoint written aside will have
        final = Path(self.args.output_dir) / folder.name if self._checkpoint_root else folder
        save_policy(
            folder,
            self._loaded.policy,
            self._loaded.preprocessor,
            self._loaded.postprocessor,
            state_dict=None if state_dict is None else _below(state_dict, POLICY_PREFIX),
            tokenizer_name=str(final.absolute()),
        )
        save_heads(folder, module, state_dict)
        (folder / RL_STATE_NAME).write_text(json.dumps(self.rl_state(), indent=2) + "\n")

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoint_root or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint aside and renames it, so that a killed process never leaves half of one."""
        final_root = Path(super()._get_output_dir(trial))
        staging = final_root / ".incomplete"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._checkpoint_root = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._checkpoint_root, self.args.save_total_limit = None, limit
        self.accelerator.wait_for_everyone()
        name = f"checkpoint-{self.state.global_step}"
        self._name_best_checkpoint(final_root)
        if self.args.should_save:
            self.state.save_to_json(str(staging / name / "trainer_state.json"))
            shutil.rmtree(final_root / name, ignore_errors=True)
            os.replace(staging / name, final_root / name)
            staging.rmdir()
            rotate_checkpoints(
                output_dir=str(final_root),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _name_best_checkpoint(self, root: Path) -> None:
        """The best checkpoint's final path, which the Trainer could not know while it wrote aside."""
        best = self.state.best_global_step
        if best:
            folder = root / f"checkpoint-{best}"
            if first_decides(lambda: folder.is_dir() or best == self.state.global_step):
                self.state.best_model_checkpoint = str(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights, heads and counters of a checkpoint; refuses missing or mismatched tensors."""
        folder = Path(resume_from_checkpoint)
        state = all_succeed(lambda: self._checked_state(folder))
        self._load_weights(folder)
        self.load_rl_state(state)

    def _load_weights(self, folder: Path) -> None:
        policy = self._loaded.policy
        gather = is_sharded(self.actor_critic) and has_lora(policy)
        load_policy_weights(policy, folder, whole_state(policy, keep=True) if gather else None)
        load_heads(folder, self.actor_critic)

    def _checked_state(self, folder: Path) -> dict[str, Any]:
        """Counters of a checkpoint, if its iterations are as long as this run's."""
        files = [folder / RL_STATE_NAME, folder / "trainer_state.json"]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"{folder} is no checkpoint of a training run ({', '.join(missing)} missing); give a checkpoint-N "
                "folder, or start RL from it with model=."
            )
        state, trainer_state = (json.loads(file.read_text()) for file in files)
        updates = self.args.updates_per_iteration
        if state["iteration"] * updates != trainer_state["global_step"]:
            raise ValueError(
                f"{folder} was written after {state['iteration']} iterations and {trainer_state['global_step']} "
                f"optimiser steps; this run has {updates} optimiser steps per iteration. Resume with the settings "
                "of that run and as many processes (with global_batch_size their number may change)."
            )
        return state

    def _load_best_model(self) -> None:
        best = first_decides(lambda: self.state.best_model_checkpoint)
        if best is not None:
            with reachable(best, self.args.device) as folder:
                self._load_weights(folder)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
