"""PPO for flow-matching policies on the hooks of ``transformers.Trainer``."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from pi_rl.envs.registry import make_env
from pi_rl.envs.vector_env import VectorEnv
from pi_rl.envs.workers import available_cores
from pi_rl.flow.chain import Chain
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.checkpoints import (
    LoadedPolicy,
    load_heads,
    load_policy_weights,
    save_heads,
    save_policy,
)
from pi_rl.policies.flow_policy import check_compatibility
from pi_rl.rl.advantages import normalize_advantages
from pi_rl.rl.buffer import Minibatch, RolloutBuffer, minibatch_permutations
from pi_rl.rl.losses import (
    clipped_surrogate,
    clipped_value_loss,
    explained_variance_from_moments,
    explained_variance_moments,
)
from pi_rl.rollout.collector import Rollout, RolloutCollector, warn_about_short_rollouts
from pi_rl.rollout.evaluator import EpisodeResults, evaluate_policy, evaluation_ids
from pi_rl.rollout.policy_io import PolicyIO
from pi_rl.rollout.randomness import shuffle_seed
from pi_rl.trainer.build import build_actor_critic, load_model
from pi_rl.trainer.callbacks import IterationReport
from pi_rl.trainer.flow_ppo_config import FlowPPOConfig
from pi_rl.trainer.metrics import MetricStore, all_reduce
from pi_rl.trainer.ticks import TickDataset, tick_loader

RL_STATE_NAME = "rl_state.json"
FIRST_RATIO_LIMIT = 0.05


class FlowPPOTrainer(Trainer):
    """Fine-tunes a flow-matching policy with PPO in simulators (πRL, arXiv 2510.25889, section 4).

    One Hugging Face epoch is one iteration: at its first tick the policy acts for ``rollout_chunks`` chunks in every
    environment, then the usual training loop runs ``update_epochs`` passes over those samples. The VLM is frozen; its
    prefix keys and values are computed once per observation in the rollout and reused in every pass. ``evaluate()``
    runs the deterministic (ODE) policy once from each of ``eval_episodes`` fixed initial states.

    Args:
        model: Hub id or local folder of a LeRobot π0/π0.5 checkpoint, what ``load_policy`` returned, or a LeRobot
            policy object (then ``processors`` are needed).
        args: Configuration.
        env: Environment name such as ``"metaworld:handle-press-v3"``, or a ``VectorEnv`` with
            ``num_envs / processes`` environments.
        env_kwargs: Options for ``make_env`` when ``env`` is a name.
        processors: LeRobot's (preprocessor, postprocessor) of a policy object.
        callbacks: Further callbacks.

    Raises:
        ValueError: When policy and environment do not fit, or the environment has the wrong size.
    """

    args: FlowPPOConfig
    optimizer: Any
    control: Any
    _tag_names = ["pi_rl", "flow-matching", "reinforcement-learning", "robotics"]

    def __init__(
        self,
        model: str | Path | LoadedPolicy | PreTrainedPolicy,
        args: FlowPPOConfig,
        env: str | VectorEnv,
        env_kwargs: Mapping[str, Any] | None = None,
        processors: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process; start one process per GPU with "
                f"`accelerate launch --num_processes {args.n_gpu} …`, or set CUDA_VISIBLE_DEVICES=0."
            )
        if args.auto_find_batch_size:
            raise ValueError("auto_find_batch_size is not supported: the batch arithmetic fixes the minibatches.")
        set_seed(args.seed)
        loaded = self._loaded = load_model(model, args, processors)
        actor_critic = build_actor_critic(loaded, args)
        self.metrics = MetricStore()
        self.env_steps, self.episodes = 0, 0
        self._rollout: Rollout | None = None
        self.last_evaluation: EpisodeResults | None = None
        self._skip_updates = False
        self._minibatch_kl = torch.zeros((), dtype=torch.float64)
        self._clock: dict[str, float] = {}
        self._checkpoint_root: str | None = None
        self._env_owned = isinstance(env, str)
        ticks = args.updates_per_iteration * args.gradient_accumulation_steps
        super().__init__(
            model=actor_critic,
            args=args,
            train_dataset=TickDataset(ticks),
            eval_dataset=TickDataset(1),
            data_collator=lambda features: features[0],
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False
        for default in (PrinterCallback, ProgressCallback):
            self.remove_callback(default)
        self.report = IterationReport(main=args.process_index == 0)
        self.add_callback(self.report)
        self.env = self._make_env(env, dict(env_kwargs or {}))
        try:
            self._connect(loaded)
        except BaseException:
            self.close()
            raise

    # ---- construction ----------------------------------------------------------------------------------------------

    def _make_env(self, env: str | VectorEnv, env_kwargs: dict[str, Any]) -> VectorEnv:
        local = self.args.num_envs // self.args.world_size
        if isinstance(env, str):
            workers = self.args.env_workers or max(1, available_cores() // self.args.world_size)
            return make_env(env, local, min(workers, local), **env_kwargs)
        if env.num_envs != local:
            raise ValueError(
                f"The environment has {env.num_envs} slots, but num_envs={self.args.num_envs} over "
                f"{self.args.world_size} process(es) asks for {local}; give one with {local}, or change num_envs."
            )
        return env

    def _connect(self, loaded: LoadedPolicy) -> None:
        policy = self.actor_critic.policy
        check_compatibility(policy, self.env.spec)
        if self.args.eval_episodes:
            evaluation_ids(len(self.env.spec.tasks), self.args.eval_episodes)
        self.io = PolicyIO(loaded.preprocessor, loaded.postprocessor, self.env.spec, policy.n_action_steps)
        if self.args.process_index == 0 and not self.args.dry_run:
            warn_about_short_rollouts(self.args.rollout_chunks, policy.n_action_steps, self.env.spec.max_episode_steps)
        self.collector = RolloutCollector(
            self.env,
            self.actor_critic,
            self.io,
            chunks=self.args.rollout_chunks,
            gamma=self.args.gamma,
            gae_lambda=self.args.gae_lambda,
            seed=self.args.seed,
            rank=self.args.process_index,
            auto_reset=self.args.auto_reset,
            prefix_storage=self.args.prefix_storage,
        )

    @property
    def actor_critic(self) -> FlowActorCritic:
        """The module inside any distributed wrapper."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def iteration(self) -> int:
        """Number of the current PPO iteration, from 0."""
        return self.state.global_step // self.args.updates_per_iteration

    def close(self) -> None:
        """Ends the simulator processes if the trainer started them."""
        if self._env_owned and getattr(self, "env", None) is not None:
            self.env.close()

    # ---- the training loop's hooks ---------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[int]:
        """Ticks, deliberately not prepared by accelerate: the same on every process and never read ahead."""
        return tick_loader(self.train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the action expert and heads, the critic at its own learning rate."""
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            groups = self.actor_critic.parameter_groups(
                self.args.learning_rate, self.args.critic_learning_rate, self.args.weight_decay
            )
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch; at an iteration's first tick the rollout comes first."""
        if inputs["tick"] == 0:
            self._begin_iteration()
        if self._skip_updates:
            # no backward pass: gradients stay None and the optimiser step changes nothing
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._clock["time/update"] = time.perf_counter() - self._update_started
        return loss

    def _begin_iteration(self) -> None:
        started = time.perf_counter()
        self._skip_updates = False
        self._rollout = self.collector.collect(self.iteration, self.report.rollout_progress)
        self._clock["time/rollout"] = time.perf_counter() - started
        self._prepare_buffer(self._rollout)
        self._update_started = time.perf_counter()

    def _prepare_buffer(self, rollout: Rollout) -> None:
        """Normalises advantages over all processes, draws the minibatches, reduces the episode statistics."""
        buffer = rollout.buffer
        args = self.args

        def reduce(values: Tensor) -> Tensor:
            return all_reduce(self.accelerator, values, "sum")

        self._explained_variance = explained_variance_from_moments(
            reduce(explained_variance_moments(buffer.values, buffer.returns))
        )
        buffer.advantages = normalize_advantages(buffer.advantages, reduce=reduce)
        passes = args.num_minibatches * args.gradient_accumulation_steps
        if len(buffer) < passes:
            raise ValueError(
                f"The rollout holds {len(buffer)} valid samples, too few for {passes} forward passes per epoch; set "
                "auto_reset=true, or use more environments or fewer minibatches."
            )
        permutations = minibatch_permutations(
            len(buffer),
            args.update_epochs,
            args.num_minibatches,
            shuffle_seed(args.seed, self.iteration, args.process_index),
        )
        sizes = reduce(torch.tensor([len(indices) for indices in permutations], dtype=torch.float64))
        self._micro_batches = [
            (part, float(size))
            for indices, size in zip(permutations, sizes.tolist(), strict=True)
            for part in torch.tensor_split(indices, args.gradient_accumulation_steps)
        ]
        sums = reduce(rollout.statistics.as_tensor())
        self._episode_metrics = rollout.statistics.metrics(sums)
        self.env_steps += int(self._episode_metrics["rollout/env_steps"])
        self.episodes += int(self._episode_metrics["rollout/episodes"])

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The tick's samples: rows of the rollout by index, prefixes from the store."""
        indices, minibatch_size = self._micro_batches[inputs["tick"]]
        assert self._rollout is not None
        buffer: RolloutBuffer = self._rollout.buffer
        return {"tick": inputs["tick"], "batch": buffer.minibatch(indices), "minibatch_size": minibatch_size}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Clipped surrogate + value loss − entropy bonus of one micro-batch (paper Eq. 13–14).

        Scaled so that the gradient after accumulation and averaging over processes is the mean over the whole
        minibatch, also when micro-batches or processes hold different numbers of samples.
        """
        args, batch = self.args, inputs["batch"]
        score, values = model("score", prefix=batch.prefix, chain=Chain(batch.x, batch.step_index))
        policy_loss, diagnostics = clipped_surrogate(score.log_prob, batch.log_prob, batch.advantages, args.clip_range)
        value_loss, value_diagnostics = clipped_value_loss(
            values, batch.values, batch.returns, clip_range=args.value_clip_range, huber_delta=args.huber_delta
        )
        entropy = score.entropy.mean()
        loss = policy_loss + args.value_loss_coefficient * value_loss - args.entropy_coefficient * entropy
        self._guard(loss, score.log_prob, values, batch, inputs["tick"])
        self.metrics.add(
            {
                "ppo/policy_loss": policy_loss,
                "ppo/value_loss": value_loss,
                "ppo/entropy": entropy,
                "ppo/noise_std": score.std_mean,
                **{f"ppo/{name}": value for name, value in {**diagnostics, **value_diagnostics}.items()},
            },
            len(batch.log_prob),
        )
        share = len(batch.log_prob) / inputs["minibatch_size"]
        self._check_target_kl(diagnostics["approx_kl"], share, inputs["tick"])
        self.report.update_progress(inputs["tick"] + 1, len(self._micro_batches))
        scaled = loss * share * args.gradient_accumulation_steps * args.world_size
        return (scaled, score) if return_outputs else scaled

    def _guard(self, loss: Tensor, log_prob: Tensor, values: Tensor, batch: Minibatch, tick: int) -> None:
        """Stops at the first value that is not finite, and when sampling and scoring disagree."""
        if not torch.isfinite(loss):
            parts = {
                "log-probs": log_prob,
                "values": values,
                "rollout log-probs": batch.log_prob,
                "advantages": batch.advantages,
                "returns": batch.returns,
                "prefix": batch.prefix.kv,
            }
            broken = [name for name, tensor in parts.items() if not torch.isfinite(tensor).all()]
            raise FloatingPointError(
                f"The loss is {loss.item()} in iteration {self.iteration}, tick {tick}; not finite: "
                f"{', '.join(broken) or 'only the loss itself'}. Lower learning_rate or max_grad_norm, raise "
                "the noise (noise_level or noise_std_min), and resume from the last checkpoint."
            )
        if tick == 0:
            error = (log_prob.detach() - batch.log_prob).exp().sub(1).abs().max()
            self.metrics.add({"ppo/ratio_error_first": error}, 1)
            if error > FIRST_RATIO_LIMIT:
                raise RuntimeError(
                    f"The first minibatch's probability ratio is off by {error.item():.3g} before any update "
                    f"(allowed: {FIRST_RATIO_LIMIT}). Sampling and scoring disagree: check that the policy runs in "
                    "the same precision and attention implementation in both."
                )

    def _check_target_kl(self, approx_kl: Tensor, share: float, tick: int) -> None:
        """After the last micro-batch of a minibatch, decides for all processes whether the iteration goes on."""
        if self.args.target_kl is None:
            return
        self._minibatch_kl = self._minibatch_kl + approx_kl.detach().cpu().double() * share
        if (tick + 1) % self.args.gradient_accumulation_steps == 0:
            mean = all_reduce(self.accelerator, self._minibatch_kl, "sum")
            self._skip_updates = mean.item() > self.args.target_kl
            self._minibatch_kl = torch.zeros_like(self._minibatch_kl)

    # ---- evaluation and logging ------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Success of the deterministic policy on the fixed initial states, shared by all processes.

        Args:
            eval_dataset: Not used; the environment is the data.
            ignore_keys: Not used.
            metric_key_prefix: Prefix of the returned names.

        Returns:
            ``{prefix}_success_rate`` with its 95 % interval, ``_n_episodes``, ``_episode_length``, per-task rates.
        """
        started = time.perf_counter()
        self.last_evaluation = self.evaluation_results()
        summary = self.last_evaluation.summary()
        metrics = {
            "success_rate": summary.success_rate,
            "ci95_low": summary.ci95[0],
            "ci95_high": summary.ci95[1],
            "episode_length": summary.mean_episode_length,
            "n_episodes": float(summary.n_episodes),
            "runtime": time.perf_counter() - started,
        }
        metrics.update({f"success_rate/{task}": part.success_rate for task, part in summary.per_task.items()})
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log({**named, "env_steps": float(self.env_steps)})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def evaluation_results(self) -> EpisodeResults:
        """One deterministic episode from each fixed initial state, in their order, gathered from all processes."""
        tasks = self.env.spec.tasks
        ids = evaluation_ids(len(tasks), self.args.eval_episodes)
        # blocks, not strides: tasks alternate in `ids`, and every process should have episodes of each
        mine = np.array_split(np.arange(len(ids)), self.args.world_size)[self.args.process_index]
        local = evaluate_policy(
            self.actor_critic,
            self.env,
            self.io,
            ids[mine],
            seed=self.args.eval_seed,
            progress=self.report.evaluation_progress,
        )
        outcome = torch.zeros(2, len(ids), dtype=torch.float64)
        outcome[0, mine] = torch.from_numpy(local.success.astype(np.float64))
        outcome[1, mine] = torch.from_numpy(local.length.astype(np.float64))
        outcome = all_reduce(self.accelerator, outcome, "sum")
        return EpisodeResults(tasks, ids, outcome[0].numpy() > 0.5, outcome[1].numpy().astype(np.int64))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the iteration's reduced metrics, episode statistics and phase times to a training log."""
        if "loss" in logs:
            logs.update(self.metrics.drain(self.accelerator))
            logs["ppo/explained_variance"] = self._explained_variance
            logs.update(self._episode_metrics)
            logs["env_steps"], logs["episodes"] = float(self.env_steps), float(self.episodes)
            logs["iteration"] = float(self.iteration)
            logs.update(self._clock)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated."""
        return 0

    # ---- checkpoints -----------------------------------------------------------------------------------------------

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
        state = {"env_steps": self.env_steps, "episodes": self.episodes, "iteration": self.iteration}
        (folder / RL_STATE_NAME).write_text(json.dumps(state, indent=2) + "\n")

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
        self.env_steps, self.episodes = state["env_steps"], state["episodes"]

    def _checked_state(self, folder: Path) -> dict[str, int]:
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
                "of that run."
            )
        return state

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            load_policy_weights(self._loaded.policy, Path(best))
            load_heads(Path(best), self.actor_critic)
