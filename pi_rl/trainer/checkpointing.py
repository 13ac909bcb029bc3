"""Checkpoints of a run: a LeRobot policy folder beside the Trainer's files, written aside and renamed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.checkpoints import LoadedPolicy, load_heads, load_policy_weights, save_heads, save_policy
from pi_rl.trainer.flow_config import FlowConfig

RL_STATE_NAME = "rl_state.json"


class CheckpointedTrainer(Trainer):
    """Saves and resumes policy, heads and counters.

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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A LeRobot policy folder plus critic, noise network and counters."""
        folder = Path(output_dir or self.args.output_dir)
        module = self.actor_critic
        # the name that a checkpoint written aside will have
        final = Path(self.args.output_dir) / folder.name if self._checkpoint_root else folder
        save_policy(
            folder,
            self._loaded.policy,
            self._loaded.preprocessor,
            self._loaded.postprocessor,
            tokenizer_name=str(final.absolute()),
        )
        save_heads(folder, module)
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
            if folder.is_dir() or best == self.state.global_step:
                self.state.best_model_checkpoint = str(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights, heads and counters of a checkpoint; refuses missing or mismatched tensors."""
        folder = Path(resume_from_checkpoint)
        state = self._checked_state(folder)
        load_policy_weights(self._loaded.policy, folder)
        load_heads(folder, self.actor_critic)
        self.load_rl_state(state)

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
        best = self.state.best_model_checkpoint
        if best is not None:
            load_policy_weights(self._loaded.policy, Path(best))
            load_heads(Path(best), self.actor_critic)
