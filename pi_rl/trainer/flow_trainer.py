"""Rollout, update and evaluation of flow-matching policies on the hooks of ``transformers.Trainer``."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback

from pi_rl.__about__ import package_versions, simulator_of
from pi_rl.argument_values import to_plain
from pi_rl.envs.registry import make_env
from pi_rl.envs.vector_env import VectorEnv
from pi_rl.envs.workers import available_cores
from pi_rl.flow.chain import Chain
from pi_rl.policies.checkpoints import LoadedPolicy
from pi_rl.policies.critic import ValueHead
from pi_rl.policies.flow_policy import FlowPolicy, check_compatibility
from pi_rl.policies.input_storage import RECOMPUTE
from pi_rl.progress import say
from pi_rl.rl.advantages import normalize_advantages
from pi_rl.rl.buffer import Minibatch, RolloutBuffer, minibatch_permutations
from pi_rl.rl.losses import clipped_surrogate
from pi_rl.rollout.collector import RolloutCollector, warn_about_short_rollouts
from pi_rl.rollout.evaluator import EpisodeResults, evaluate_policy, evaluation_ids
from pi_rl.rollout.policy_io import PolicyIO, fit_prompt
from pi_rl.rollout.randomness import shuffle_seed
from pi_rl.rollout.rollout import Rollout
from pi_rl.rollout.zero_success import warn_about_zero_success
from pi_rl.trainer.build import build_actor_critic, build_input_storage, load_model
from pi_rl.trainer.callbacks import IterationReport
from pi_rl.trainer.dashboards import close_dashboards, prepare_dashboards
from pi_rl.trainer.disk import check_output_folder
from pi_rl.trainer.flow_config import FlowConfig
from pi_rl.trainer.hub_push import PushingTrainer
from pi_rl.trainer.metrics import MetricStore, all_reduce
from pi_rl.trainer.preemption import InterruptibleTrainer
from pi_rl.trainer.ticks import TickDataset, tick_loader


@dataclasses.dataclass
class Estimates:
    """What an algorithm makes of a rollout: T chunks, S transitions each, B trajectories.

    Attributes:
        advantages: (T, B) or (T, S, B), not normalised.
        returns: The same shape, regression targets of the critic; None without a critic.
        used: (T, B) bool, executed chunks that are trained on; None means all.
        normalize: Whether advantages are normalised over all samples of the iteration.
        metrics: For the log, already reduced over processes.
    """

    advantages: Tensor
    returns: Tensor | None = None
    used: Tensor | None = None
    normalize: bool = True
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


class FlowTrainer(PushingTrainer, InterruptibleTrainer):
    """What reinforcement learning of flow-matching policies has in common; the base of PPO and GRPO.

    One Hugging Face epoch is one iteration: at its first tick the policy acts in every environment, the algorithm
    estimates advantages, then the usual training loop runs ``update_epochs`` passes over those samples. Subclasses say
    how advantages are estimated (:meth:`estimate`) and, where they have one, what trains the critic
    (:meth:`critic_loss`).

    Args:
        model: Hub id or local folder of a LeRobot π0/π0.5 checkpoint, what ``load_policy`` returned, or a LeRobot
            policy object (then ``processors`` are needed).
        args: Configuration.
        env: Environment name such as ``"metaworld:handle-press-v3"``, or a ``VectorEnv`` with
            ``num_envs / processes`` environments.
        env_kwargs: Options for ``make_env`` when ``env`` is a name.
        processors: LeRobot's (preprocessor, postprocessor) of a policy object.
        callbacks: Further callbacks.
        peft_config: LoRA of the VLM, trained together with the whole action expert (paper section 5.5); the update
            then runs the VLM on every observation. None keeps the VLM frozen, and its prefix is computed once per
            observation.

    Raises:
        ValueError: When policy and environment do not fit, or the environment has the wrong size.
    """

    config_class: type[FlowConfig] = FlowConfig
    args: FlowConfig
    optimizer: Any
    control: Any
    _tag_names = ["pi_rl", "flow-matching", "reinforcement-learning", "robotics"]

    def __init__(
        self,
        model: str | Path | LoadedPolicy | PreTrainedPolicy,
        args: FlowConfig,
        env: str | VectorEnv,
        env_kwargs: Mapping[str, Any] | None = None,
        processors: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: LoraConfig | None = None,
    ) -> None:
        if not isinstance(args, self.config_class):
            raise ValueError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, got a {type(args).__name__}."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process; start one process per GPU with "
                f"`accelerate launch --num_processes {args.n_gpu} …`, or set CUDA_VISIBLE_DEVICES=0."
            )
        if args.auto_find_batch_size:
            raise ValueError("auto_find_batch_size is not supported: the batch arithmetic fixes the minibatches.")
        if args.process_index == 0:
            check_output_folder(args.output_dir)
        set_seed(args.seed)
        self.args = args
        self._loaded = load_model(model, args, processors)
        actor_critic = build_actor_critic(self._loaded, args, peft_config, self.make_critic)
        self.metrics = MetricStore()
        self._rollout: Rollout | None = None
        self._buffer: RolloutBuffer | None = None
        self.last_evaluation: EpisodeResults | None = None
        self._skip_updates = False
        self._encodes_again = False
        self._minibatch_kl = torch.zeros((), dtype=torch.float64)
        self._clock: dict[str, float] = {}
        self._env_owned, self._env_options = isinstance(env, str), dict(env_kwargs or {})
        ticks = args.updates_per_iteration * args.gradient_accumulation_steps
        super().__init__(
            model=actor_critic,
            args=args,
            train_dataset=TickDataset(ticks),
            eval_dataset=TickDataset(1),
            data_collator=lambda features: features[0],
            callbacks=callbacks,
        )
        self.shard(actor_critic)
        self.model_accepts_loss_kwargs = False
        for default in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):  # in notebooks the latter is another class
            self.remove_callback(default)
        self.report = IterationReport(main=args.process_index == 0, bars=not args.disable_tqdm)
        self.add_callback(self.report)
        self.env = self._make_env(env)
        try:
            self._connect(self._loaded)
            prepare_dashboards(self)
        except BaseException:
            self.close()
            raise

    # ---- what an algorithm defines ---------------------------------------------------------------------------------

    def make_critic(self, policy: FlowPolicy) -> ValueHead | None:
        """The critic to train with the policy; None for an algorithm without one."""
        return None

    @property
    def group_size(self) -> int:
        """Environments that start from the same initial state."""
        return 1

    @property
    def critic_learning_rate(self) -> float:
        """Learning rate of the critic's parameters."""
        return self.args.learning_rate

    def estimate(self, rollout: Rollout) -> Estimates:
        """Advantages, and returns for the critic, of a rollout."""
        raise NotImplementedError(f"{type(self).__name__} must define estimate(rollout)")

    def critic_loss(self, values: Tensor | None, batch: Minibatch) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The critic's weighted loss on a micro-batch and what to log of it."""
        return 0.0, {}

    def policy_loss_weight(self) -> float:
        """Weight of the policy's loss in this iteration; 0 leaves the policy as it is."""
        return 1.0

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        return all_reduce(self.accelerator, values, "sum")

    def rl_state(self) -> dict[str, Any]:
        """Counters, versions, and the environment: its options are known where the trainer made it, else null."""
        options, name = to_plain(self._env_options, strict=False) if self._env_owned else None, self.env.spec.name
        versions = package_versions(simulator_of(name))
        return {**super().rl_state(), "env": {"name": name, "options": options}, "versions": versions}

    # ---- construction ----------------------------------------------------------------------------------------------

    def _make_env(self, env: str | VectorEnv) -> VectorEnv:
        local = self.args.num_envs // self.args.world_size
        if isinstance(env, str):
            cores = max(1, available_cores() // self.args.world_size)
            workers = self.args.env_workers or cores * self.args.pipeline_stages
            return make_env(env, local, min(workers, local), self.args.env_timeout_s, **self._env_options)
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
            evaluation_ids(self.env.spec, self.args.eval_episodes)
        fit_prompt(policy, loaded.preprocessor, self.env.spec)
        self.io = PolicyIO(loaded.preprocessor, loaded.postprocessor, self.env.spec, policy.n_action_steps)
        if self.args.process_index == 0 and not self.args.dry_run:
            warn_about_short_rollouts(self.args.rollout_chunks, policy.n_action_steps, self.env.spec.max_episode_steps)
        self.collector = RolloutCollector(
            self.env,
            self.actor_critic,
            self.io,
            chunks=self.args.rollout_chunks,
            epochs=self.args.rollout_epochs,
            group_size=self.group_size,
            seed=self.args.seed,
            rank=self.args.process_index,
            processes=self.args.world_size,
            auto_reset=self.args.auto_reset,
            pipeline_stages=self.args.pipeline_stages,
            inference_batch_size=self.rows_at_once(self.args.inference_batch_size, self.args.pipeline_stages),
            agree=self.agree,
            storage=build_input_storage(
                self.actor_critic,
                self.args,
                agree=lambda lacks: all_reduce(self.accelerator, lacks, "max"),
                report=self._storage_chosen,
            ),
        )

    def _storage_chosen(self, storage: str, line: str) -> None:
        self._encodes_again = storage == RECOMPUTE
        if self._encodes_again:
            self.actor_critic.execution = self.same_passes(self.args.execution(True))
        if self.args.process_index == 0:
            say(line)

    def close(self) -> None:
        """Ends simulators that the trainer started and dashboards, frees stored inputs, reports failed pushes."""
        self.report_pushes()
        close_dashboards(self)
        if getattr(self, "collector", None) is not None:
            self.collector.close()
        if self._env_owned and getattr(self, "env", None) is not None:
            self.env.close()

    # ---- the training loop's hooks ---------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[int]:
        """Ticks, deliberately not prepared by accelerate: the same on every process and never read ahead."""
        return tick_loader(self.train_dataset)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """The model runs its own autocast and compiles its own parts, also before and without the Trainer's loop."""
        built = super()._build_accelerator_args(**kwargs)
        built["mixed_precision"] = "no"
        built.pop("dynamo_plugin", None)
        return built

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the action expert and heads, the critic at its own learning rate."""
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            groups = self.actor_critic.parameter_groups(
                self.args.learning_rate, self.critic_learning_rate, self.args.weight_decay
            )
            self.optimizer = optimizer_class(groups, **kwargs)
            self._remember_parameters()
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch; at an iteration's first tick the rollout comes first."""
        if inputs["tick"] == 0:
            self._begin_iteration()
        nothing_to_learn = self._micro_batches[inputs["tick"]][1] == 0
        if self._skip_updates or nothing_to_learn:
            # no backward pass: gradients stay None and the optimiser step changes nothing
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.policy_loss_weight() == 0:
            # zero gradients would still let weight decay and momentum move the policy
            for group in self.optimizer.param_groups:
                if not group["name"].startswith("critic"):
                    for parameter in group["params"]:
                        parameter.grad = None
        self._clock["time/update"] = time.perf_counter() - self._update_started
        return loss

    def _begin_iteration(self) -> None:
        started = time.perf_counter()
        self._skip_updates = False
        level = self.args.noise_level_at(self.iteration)
        model = self.actor_critic
        model.sampler = dataclasses.replace(model.sampler, noise_level=level)
        self._rollout = self._buffer = None  # frees the last rollout before the next is collected
        self._rollout = self.until_told(
            lambda progress: self.collector.collect(self.iteration, progress),
            self.report.rollout_progress,
        )
        self._clock["time/rollout"] = time.perf_counter() - started
        self._clock["time/update"] = 0.0
        self._prepare_buffer(self._rollout)
        self._update_started = time.perf_counter()

    def _prepare_buffer(self, rollout: Rollout) -> None:
        """Estimates advantages, draws the minibatches, reduces the episode statistics."""
        args = self.args
        estimates = self.estimate(rollout)
        buffer = self._buffer = rollout.buffer(estimates.advantages, estimates.returns)
        samples = torch.arange(len(buffer))
        if estimates.used is not None:
            samples = samples[rollout.of_chunks(estimates.used).expand_as(buffer.advantages).flatten().cpu()]
        if estimates.normalize:
            flat = buffer.advantages.flatten()
            flat[samples] = normalize_advantages(flat[samples], reduce=self.reduce)
            buffer.advantages = flat.view(buffer.advantages.shape)
        permutations = minibatch_permutations(
            len(samples),
            args.update_epochs,
            args.num_minibatches,
            shuffle_seed(args.seed, self.iteration, args.process_index),
        )
        sizes = self.reduce(torch.tensor([len(indices) for indices in permutations], dtype=torch.float64))
        self._micro_batches = [
            (samples[part], float(size))
            for indices, size in zip(permutations, sizes.tolist(), strict=True)
            for part in torch.tensor_split(indices, args.gradient_accumulation_steps)
        ]
        self._iteration_metrics = estimates.metrics
        if args.noise_level_end is not None:
            self._iteration_metrics["policy/noise_level"] = args.noise_level_at(self.iteration) or 0.0
        statistics = rollout.statistics.metrics(self.reduce(rollout.statistics.as_tensor()))
        self._iteration_metrics.update(statistics)
        self.env_steps += int(statistics["rollout/env_steps"])
        self.episodes += int(statistics["rollout/episodes"])

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The tick's samples: rows of the rollout by index, the policy's inputs from their store."""
        tick = inputs["tick"]
        indices, minibatch_size = self._micro_batches[tick]
        assert self._buffer is not None
        batch = self._buffer.minibatch(self._indices(tick))
        if tick + 1 < len(self._micro_batches):
            self._buffer.prefetch(self._indices(tick + 1))
        return {"tick": tick, "batch": batch, "share": len(indices) / minibatch_size}

    def _indices(self, tick: int) -> Tensor:
        indices = self._micro_batches[tick][0]
        # without samples where another process has some: one of no weight, to take part in the collective calls
        return indices if len(indices) else torch.zeros(1, dtype=torch.int64)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Clipped surrogate + critic's loss − entropy bonus of one micro-batch (paper Eq. 14).

        Scaled so that the gradient after accumulation and averaging over processes is the mean over the whole
        minibatch, also when micro-batches or processes hold different numbers of samples.
        """
        args, batch, tick, share = self.args, inputs["batch"], inputs["tick"], inputs["share"]
        score, values = model(
            "score", inputs=batch.inputs, chain=Chain(batch.x, batch.step_index), critic_input=batch.critic_input
        )
        policy_loss, diagnostics = clipped_surrogate(
            score.log_prob, batch.log_prob, batch.advantages, args.clip_range, args.clip_range_high
        )
        critic_loss, critic_metrics = self.critic_loss(values, batch)
        entropy = score.entropy.mean()
        loss = self.policy_loss_weight() * (policy_loss - args.entropy_coefficient * entropy) + critic_loss
        self.guard(loss, score.log_prob, values, batch, tick)
        self.metrics.add(
            {
                "policy/loss": policy_loss,
                "policy/entropy": entropy,
                "policy/noise_std": score.std_mean,
                **{f"policy/{name}": value for name, value in diagnostics.items()},
                **critic_metrics,
            },
            len(batch) if share > 0 else 0,
        )
        self._check_target_kl(diagnostics["approx_kl"], share, tick)
        self.report.update_progress(tick + 1, len(self._micro_batches), diagnostics)
        scaled = self.poisoned(loss) * share * args.gradient_accumulation_steps * args.world_size
        return (scaled, score) if return_outputs else scaled

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
            ``{prefix}_success_rate`` with its 95 % interval, ``_n_episodes``, ``_episode_length``, ``_return`` (mean
            sum of rewards), the rates of tasks and groups of tasks, and the mean of the groups where there are some.
        """
        started = time.perf_counter()
        self.last_evaluation = self.evaluation_results()
        if self.state.global_step == 0 and self.args.process_index == 0:
            warn_about_zero_success(self.last_evaluation, self._loaded, self.actor_critic.policy)
        metrics = {**self.last_evaluation.summary().metrics(), "runtime": time.perf_counter() - started}
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log({**named, "env_steps": float(self.env_steps)})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def evaluation_results(self) -> EpisodeResults:
        """One deterministic episode from each fixed initial state, in their order, gathered from all processes."""
        ids = evaluation_ids(self.env.spec, self.args.eval_episodes)
        # blocks, not strides: tasks alternate in `ids`, and every process should have episodes of each
        mine = np.array_split(np.arange(len(ids)), self.args.world_size)[self.args.process_index]
        local = self.until_told(
            lambda progress: evaluate_policy(
                self.actor_critic,
                self.env,
                self.io,
                ids[mine],
                seed=self.args.eval_seed,
                batch_size=self.rows_at_once(),
                progress=progress,
                agree=self.agree,
            ),
            self.report.evaluation_progress,
        )
        outcome = torch.zeros(4, len(ids), dtype=torch.float64)
        for row, values in zip(outcome, (local.success, local.length, local.returns, local.failed), strict=True):
            row[mine] = torch.from_numpy(values.astype(np.float64))
        success, length, returns, failed = self.reduce(outcome).numpy()
        return EpisodeResults(self.env.spec, ids, success > 0.5, length.astype(np.int64), returns, failed > 0.5)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the iteration's reduced metrics, episode statistics and phase times to a training log."""
        if "loss" in logs:
            logs.update(self.metrics.drain(self.accelerator))
            logs.update(self._iteration_metrics)
            logs["env_steps"], logs["episodes"] = float(self.env_steps), float(self.episodes)
            logs["iteration"] = float(self.iteration)
            logs.update(self._clock)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated."""
        return 0
