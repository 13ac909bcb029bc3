"""Configuration shared by the trainers: flow sampling, rollouts, updates, evaluation and checkpoints."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from pi_rl.arguments import option
from pi_rl.flow.sampler import FlowSampler
from pi_rl.policies.attention import ATTENTION_IMPLEMENTATIONS, default_attention
from pi_rl.policies.execution import Execution
from pi_rl.policies.input_storage import STORAGES
from pi_rl.rollout.stages import check_stages
from pi_rl.trainer.processes import join_cpu_processes

FLOW, UPDATE, ROLLOUT, EVAL = "Flow sampling", "Policy update", "Rollout", "Evaluation and checkpoints"
COMPUTE = "Precision and memory"


@dataclass
class FlowConfig(TrainingArguments):
    """Arguments of reinforcement learning on flow-matching policies, on top of ``transformers.TrainingArguments``.

    One Hugging Face epoch is one iteration: a rollout of ``num_envs x rollout_chunks x rollout_epochs`` chunks and
    ``update_epochs`` passes over them in minibatches of ``per_device_train_batch_size x gradient_accumulation_steps x
    processes`` samples (``global_batch_size`` sets that product). A sample is a chunk; in the two-layer MDP each of
    its stochastic denoising steps is one. ``num_iterations`` replaces ``num_train_epochs``. Every field documents
    itself in ``metadata["help"]``; ``--help`` of the recipes prints them by topic.

    Raises:
        ValueError: At construction, when values are out of range or the batch arithmetic does not come out even; the
            message gives values that would.
    """

    noise: str = option("flow_noise", FLOW, "exploration noise: flow_noise (learned), flow_sde or flow_cps")
    mdp: str | None = option(
        None,
        FLOW,
        "one_layer (likelihood of the whole denoising chain), two_layer (every denoising step is a transition) or "
        "hybrid (one stochastic step, the others ODE); default: one_layer for flow_noise, hybrid otherwise",
    )
    denoising_steps: int = option(4, FLOW, "K, steps of the denoising chain in rollouts and evaluation")
    noise_level: float = option(0.5, FLOW, "a of flow_sde (above 0) and flow_cps (between 0 and 1)")
    noise_level_end: float | None = option(
        None, FLOW, "noise level of the last iteration, reached linearly; default: the level stays as it is"
    )
    noise_std_min: float = option(0.08, FLOW, "smallest standard deviation of flow_noise, in normalised action units")
    noise_std_max: float = option(0.16, FLOW, "largest standard deviation of flow_noise")
    ignore_last: bool = option(False, FLOW, "the last denoising step is never stochastic")
    noise_scope: str = option(
        "scored",
        FLOW,
        "scored: noise only where it is scored, so all that is drawn is scored; all: on the whole chunk, as RLinf",
    )
    joint_reduction: str = option(
        "sum", FLOW, "one_layer: sum of the chain's log-probs (Eq. 5) or mean over K+1 terms, as RLinf"
    )
    likelihood_level: str = option(
        "chunk",
        FLOW,
        "what has a probability ratio of its own: chunk (exact), action or element (RLinf: token)",
    )
    step_draw: str = option(
        "sample", FLOW, "hybrid: the stochastic step is drawn per sample, or per batch (one for all, as RLinf)"
    )

    num_iterations: int = option(100, UPDATE, "iterations (rollout + update)")
    update_epochs: int = option(4, UPDATE, "passes over each rollout")
    clip_range: float = option(0.2, UPDATE, "ratio clip ε")
    clip_range_high: float | None = option(None, UPDATE, "upper ratio clip; default: the same as clip_range")
    entropy_coefficient: float = option(0.0, UPDATE, "weight of the entropy bonus (learned noise only)")
    target_kl: float | None = option(
        None, UPDATE, "skip the rest of an iteration's updates once the approximate KL of a minibatch exceeds this"
    )

    num_envs: int = option(64, ROLLOUT, "environments over all processes")
    rollout_chunks: int = option(16, ROLLOUT, "T, action chunks per environment and rollout")
    rollout_epochs: int = option(
        1, ROLLOUT, "how often rollout_chunks are collected per iteration, each time with fresh episodes"
    )
    n_action_steps: int | None = option(
        None, ROLLOUT, "C, executed actions of each predicted chunk; default: the policy's"
    )
    auto_reset: bool = option(
        True, ROLLOUT, "reset finished environments within a rollout; otherwise one episode per environment"
    )
    env_workers: int | None = option(
        None, ROLLOUT, "simulator processes per process; default: its CPU cores, once for each pipeline stage"
    )
    env_timeout_s: float = option(
        300.0, ROLLOUT, "seconds that one call of a simulator may take before its process is replaced"
    )
    pipeline_stages: int = option(
        1,
        ROLLOUT,
        "2: half of the environments is simulated, in worker processes, while the policy infers for the other; or 1",
    )
    inference_batch_size: int | None = option(
        None, ROLLOUT, "environments per pass of the network in rollouts; default: all of a stage"
    )
    prefix_storage: str = option(
        "auto",
        COMPUTE,
        "where prefix keys and values wait for the update: device, host or disk; recompute keeps observations and "
        "encodes them again, as a trained VLM needs; auto takes the first that has room",
    )
    prefix_storage_dir: str | None = option(
        None,
        COMPUTE,
        "folder of the file of prefix_storage disk (auto and recompute may come to it); default: output_dir",
    )
    vlm_dtype: str | None = option(
        None,
        COMPUTE,
        "numeric type of the frozen VLM: bfloat16 or float32; default: bfloat16 with bf16, else as it was saved",
    )
    train_vlm: bool = option(
        False, COMPUTE, "train the whole VLM too (float32 masters: shard them with FSDP); excludes LoRA"
    )
    attn_implementation: str | None = option(
        None,
        COMPUTE,
        "attention of VLM and action expert, in rollouts and updates alike: sdpa (fused) or eager; default: sdpa on a "
        "GPU and with bf16, else eager",
    )
    bf16: bool = option(
        False,
        COMPUTE,
        "matrix products of rollout, update and evaluation in bfloat16; trained weights keep float32 masters",
    )
    gradient_checkpointing: bool = option(
        False, COMPUTE, "recompute the trained layers in the backward pass: less memory, a third more time there"
    )
    torch_compile: bool = option(
        False,
        COMPUTE,
        "compile the action expert's pass; torch_compile_mode=reduce-overhead uses CUDA graphs",
    )

    eval_episodes: int = option(200, EVAL, "fixed initial states per evaluation; 0 switches evaluation off")
    eval_every_iterations: int | None = option(None, EVAL, "evaluate every N iterations; default: never within a run")
    eval_videos: int = option(
        0, EVAL, "evaluation episodes filmed each time, into output_dir/videos and the dashboards of report_to"
    )
    eval_seed: int = option(0, EVAL, "seed of the flow's initial noise in evaluation")
    output_dir: str = option("trainer_output", EVAL, "folder of checkpoints, results and the trained policy")
    save_strategy: str = option("no", EVAL, "checkpoints: no, steps, epoch or best; easier: save_every_iterations")
    save_every_iterations: int | None = option(None, EVAL, "checkpoint every N iterations; default: never")
    dry_run: bool = option(
        False, EVAL, "print the run's batch arithmetic, run one chunk, one update and one save, then stop"
    )

    global_batch_size: int | None = option(
        None,
        UPDATE,
        "samples per optimiser step over all processes; sets gradient_accumulation_steps. Default: "
        "per_device_train_batch_size x gradient_accumulation_steps x processes",
    )
    learning_rate: float = option(1e-5, UPDATE, "learning rate of action expert and noise network")
    per_device_train_batch_size: int = option(64, UPDATE, "samples per forward pass and process in the update")
    max_grad_norm: float = option(1.0, UPDATE, "gradient-norm clip")
    adam_beta2: float = option(0.95, UPDATE, "β2 of AdamW")
    lr_scheduler_type: str = option("cosine", UPDATE, "learning-rate schedule over all optimiser steps")
    logging_strategy: str = option("epoch", EVAL, "log once per iteration")
    logging_nan_inf_filter: bool = option(False, EVAL, "must stay off: pi_rl stops at the first NaN with a diagnosis")
    eval_on_start: bool = option(
        True, EVAL, "evaluate before the first iteration: the SFT baseline (recipes always do)"
    )
    metric_for_best_model: str | None = option("success_rate", EVAL, "metric that marks the best checkpoint")
    greater_is_better: bool | None = option(True, EVAL, "direction of that metric")
    report_to: str | list[str] | None = option("none", EVAL, "tensorboard, wandb, trackio, …")
    trackio_space_id: str | None = option(
        None, EVAL, "Space to log to with trackio; default: a local folder, nothing is published"
    )
    project: str = option("pi_rl", EVAL, "trackio's project")
    remove_unused_columns: bool = option(False, EVAL, "no dataset columns here")
    ddp_find_unused_parameters: bool | None = option(False, EVAL, "every trained parameter is used by the loss")

    def __post_init__(self) -> None:
        self._check_ranges()
        self.planned_eval_episodes = self.eval_episodes
        # what follows from other options; a written configuration leaves it out, so that it can be varied
        self.derived = {"num_train_epochs", "resume_from_checkpoint"}  # the latter is about one start, not the run
        if self.eval_episodes == 0:
            self.eval_on_start, self.eval_every_iterations = False, None
        self.num_train_epochs = self.num_iterations
        self._accumulate()
        self._iterations_to_steps()
        if self.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
            join_cpu_processes(self.ddp_backend, self.ddp_timeout)
        super().__post_init__()
        self._check_precision()
        self.sampler()
        self._check_annealing()
        self._check_batches()
        self._check_strategies()
        self.arithmetic = self.batch_arithmetic()
        if self.dry_run:
            self._shrink()

    def _shrink(self) -> None:
        """One chunk, one update, one save by the caller; ``arithmetic`` still describes the full run."""
        self.output_dir = f"{str(self.output_dir).rstrip('/')}-dry-run"
        self.num_iterations = self.num_train_epochs = self.rollout_chunks = self.update_epochs = 1
        self.rollout_epochs, self.global_batch_size = 1, None
        local = self.samples_per_iteration // self.world_size
        self.per_device_train_batch_size = math.gcd(self.per_device_train_batch_size, local)
        self.gradient_accumulation_steps = local // self.per_device_train_batch_size
        self.max_steps = -1
        self.eval_episodes, self.eval_on_start = 0, False
        self.eval_strategy, self.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
        self.logging_steps = 1

    def sampler(self) -> FlowSampler:
        """The training sampler these options describe."""
        mdp = self.mdp or ("one_layer" if self.noise == "flow_noise" else "hybrid")
        return FlowSampler(
            noise=self.noise,
            mdp=mdp,
            denoising_steps=self.denoising_steps,
            noise_level=None if self.noise == "flow_noise" else self.noise_level,
            ignore_last=self.ignore_last,
            noise_scope=self.noise_scope,
            joint_reduction=self.joint_reduction,
            likelihood_level=self.likelihood_level,
            step_draw=self.step_draw,
        )

    def noise_level_at(self, iteration: int) -> float | None:
        """Noise level of an iteration: constant, or linear from ``noise_level`` to ``noise_level_end``."""
        if self.noise == "flow_noise":
            return None
        if self.noise_level_end is None:
            return self.noise_level
        share = iteration / max(1, self.num_iterations - 1)
        return self.noise_level + share * (self.noise_level_end - self.noise_level)

    def attention(self) -> str:
        """The attention kernels of VLM and action expert."""
        return self.attn_implementation or default_attention(self.device, bf16=self.bf16)

    def execution(self, prefix_is_live: bool) -> Execution:
        """Numeric type of the network's passes, and their rows where rounding depends on them.

        Args:
            prefix_is_live: Whether the update encodes observations, as rollouts do.
        """
        rows = self.per_device_train_batch_size
        acting = self.inference_batch_size or max(1, self.num_envs // self.world_size // self.pipeline_stages)
        # a divisor of both, so that no observation is encoded only to fill a pass, unless that makes passes too small
        common = math.gcd(rows, acting)
        fixed = self.bf16 or self.torch_compile
        return Execution(
            compute_dtype=torch.bfloat16 if self.bf16 else None,
            expert_rows=rows if fixed else None,
            encode_rows=(common if 4 * common >= min(rows, acting) else min(rows, acting))
            if fixed and prefix_is_live
            else None,
        )

    @property
    def samples_per_iteration(self) -> int:
        """Samples of one iteration over all processes when no environment is masked."""
        return self.num_envs * self.rollout_chunks * self.rollout_epochs * self.sampler().transitions

    @property
    def minibatch_size(self) -> int:
        """Samples per optimiser step over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def num_minibatches(self) -> int:
        """Optimiser steps per update epoch."""
        return self.samples_per_iteration // self.minibatch_size

    @property
    def updates_per_iteration(self) -> int:
        """Optimiser steps per iteration."""
        return self.update_epochs * self.num_minibatches

    def batch_arithmetic(self) -> str:
        """One line that derives optimiser steps from environments, chunks and batch sizes."""
        return (
            f"{self._rollout_arithmetic()} = {self.samples_per_iteration} samples; "
            f"minibatch {self.minibatch_size} = {self.per_device_train_batch_size} per device x "
            f"{self.gradient_accumulation_steps} accumulation x {self.world_size} process(es); "
            f"{self.num_minibatches} minibatches x {self.update_epochs} epochs = {self.updates_per_iteration} "
            f"optimiser steps per iteration; x {self.num_iterations} iterations = "
            f"{self.updates_per_iteration * self.num_iterations} optimiser steps"
        )

    def _rollout_arithmetic(self) -> str:
        factors = [f"{self.num_envs} envs x {self.rollout_chunks} chunks"]
        if self.rollout_epochs > 1:
            factors.append(f"{self.rollout_epochs} rollout epochs")
        if (transitions := self.sampler().transitions) > 1:
            factors.append(f"{transitions} denoising steps")
        return " x ".join(factors)

    def _accumulate(self) -> None:
        """Derives gradient_accumulation_steps from ``global_batch_size``."""
        if self.global_batch_size is None:
            return
        step = self.per_device_train_batch_size * self._world_size_hint()
        if self.global_batch_size % step:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of {step} = "
                f"per_device_train_batch_size={self.per_device_train_batch_size} x {self._world_size_hint()} "
                "process(es); change one of them."
            )
        if self.gradient_accumulation_steps not in (1, self.global_batch_size // step):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} and gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} contradict each other; leave one of them out."
            )
        self.gradient_accumulation_steps = self.global_batch_size // step
        self.derived |= {"gradient_accumulation_steps"}

    @staticmethod
    def _world_size_hint() -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    def _check_ranges(self) -> None:
        rules: list[tuple[str, bool, str]] = [
            ("num_iterations", self.num_iterations >= 1, "at least 1"),
            ("num_envs", self.num_envs >= 1, "at least 1"),
            ("rollout_chunks", self.rollout_chunks >= 1, "at least 1"),
            ("rollout_epochs", self.rollout_epochs >= 1, "at least 1"),
            ("update_epochs", self.update_epochs >= 1, "at least 1"),
            ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "at least 1"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"),
            ("max_steps", self.max_steps <= 0, "left out: set num_iterations"),
            ("clip_range", 0 < self.clip_range < 1, "between 0 and 1"),
            (
                "noise_level_end",
                self.noise_level_end is None or self.noise != "flow_noise",
                "left out: flow_noise learns its noise",
            ),
            (
                "noise",
                self.noise != "ode",
                "flow_noise, flow_sde or flow_cps: ode is deterministic, it has no log-prob",
            ),
            ("fp16", not self.fp16, "false; use bf16, whose range needs no loss scaling"),
            ("entropy_coefficient", self.entropy_coefficient >= 0, "0 or more"),
            ("noise_std_min", self.noise_std_min > 0, "above 0"),
            ("noise_std_max", self.noise_std_max > self.noise_std_min, f"above noise_std_min={self.noise_std_min}"),
            ("eval_episodes", self.eval_episodes >= 0, "0 or more"),
            (
                "eval_videos",
                0 <= self.eval_videos <= self.eval_episodes,
                f"0 or more, and at most eval_episodes={self.eval_episodes}",
            ),
            ("vlm_dtype", self.vlm_dtype in (None, "bfloat16", "float32"), "bfloat16 or float32, or left out"),
            ("prefix_storage", self.prefix_storage in STORAGES, f"one of {', '.join(STORAGES)}"),
            (
                "prefix_storage_dir",
                self.prefix_storage_dir is None or self.prefix_storage in ("auto", "disk", "recompute"),
                "left out unless prefix_storage is disk, auto or recompute",
            ),
            (
                "attn_implementation",
                self.attn_implementation in (None, *ATTENTION_IMPLEMENTATIONS),
                f"one of {', '.join(ATTENTION_IMPLEMENTATIONS)}, or left out",
            ),
            (
                "vlm_dtype",
                self.vlm_dtype is None or not self.train_vlm,
                "left out with train_vlm: what is trained has float32 masters",
            ),
            (
                "num_train_epochs",
                self.num_train_epochs in (3.0, self.num_iterations),
                "left out: set num_iterations, one epoch is one iteration",
            ),
            (
                "eval_strategy",
                self.eval_episodes > 0 or self.eval_strategy in ("no", IntervalStrategy.NO),
                "no when eval_episodes is 0",
            ),
            ("env_timeout_s", 0 < self.env_timeout_s < math.inf, "a number of seconds above 0"),
            ("save_only_model", not self.save_only_model, "false; save_model() writes the policy alone"),
            ("logging_nan_inf_filter", not self.logging_nan_inf_filter, "false (it would show a NaN loss as 0)"),
        ]
        optional = ("clip_range_high", "target_kl", "n_action_steps", "env_workers", "global_batch_size")
        for name in (*optional, "eval_every_iterations", "save_every_iterations"):
            value = getattr(self, name)
            rules.append((name, value is None or value > 0, "above 0, or left out"))
        check_rules(self, rules)

    def _iterations_to_steps(self) -> None:
        """Translates iterations into optimiser steps, the Trainer's unit.

        Also for logging once per iteration: the Trainer then logs, evaluates and saves in this order and in one place,
        so that a checkpoint holds its own iteration's log.
        """
        minibatch = self.per_device_train_batch_size * self.gradient_accumulation_steps * self._world_size_hint()
        updates = max(1, self.update_epochs * (self.samples_per_iteration // max(1, minibatch)))
        if self.logging_strategy == "epoch":
            self.logging_strategy, self.logging_steps = "steps", updates
            self.derived |= {"logging_strategy", "logging_steps"}
        if self.eval_every_iterations is not None:
            self.eval_strategy, self.eval_steps = "steps", updates * self.eval_every_iterations
            self.derived |= {"eval_strategy", "eval_steps", "do_eval"}
        if self.save_every_iterations is not None:
            self.save_strategy, self.save_steps = "steps", updates * self.save_every_iterations
            self.derived |= {"save_strategy", "save_steps"}

    def _check_precision(self) -> None:
        """Accelerate's own mixed precision counts as ours: a launch file may ask for it instead of ``bf16``."""
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r} is not supported; use bf16 or no.")
        self.bf16 = self.mixed_precision == "bf16"

    def _check_annealing(self) -> None:
        if self.noise_level_end is None:
            return
        replace(self.sampler(), noise_level=self.noise_level_end)
        if self.num_iterations == 1:
            raise ValueError("noise_level_end is reached in the last iteration, and num_iterations=1; leave it out.")

    def _check_batches(self) -> None:
        if self.num_envs % self.world_size:
            lower = max(self.num_envs // self.world_size, 1) * self.world_size
            raise ValueError(
                f"num_envs={self.num_envs} cannot be shared equally by {self.world_size} processes; "
                f"use {lower} or {lower + self.world_size}."
            )
        check_stages(self.num_envs // self.world_size, 1, self.pipeline_stages, self.inference_batch_size)
        local = self.samples_per_iteration // self.world_size
        step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if local % step:
            fitting = [size for size in range(1, local + 1) if local % (size * self.gradient_accumulation_steps) == 0]
            near = sorted(fitting, key=lambda size: abs(size - self.per_device_train_batch_size))[:4]
            raise ValueError(
                f"A rollout has {self._rollout_arithmetic()} / {self.world_size} process(es) = "
                f"{local} samples per process, which do not divide into per_device_train_batch_size="
                f"{self.per_device_train_batch_size} x gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}. "
                + (
                    f"Use per_device_train_batch_size {' or '.join(map(str, sorted(near)))}."
                    if near
                    else "Use a gradient_accumulation_steps that divides the samples."
                )
            )

    def _check_strategies(self) -> None:
        updates = self.updates_per_iteration
        for name, strategy, steps in (
            ("eval_steps", self.eval_strategy, self.eval_steps),
            ("save_steps", self.save_strategy, self.save_steps),
            ("logging_steps", self.logging_strategy, self.logging_steps),
        ):
            if strategy == "steps" and steps is not None and steps > 0 and steps % updates:
                raise ValueError(
                    f"{name}={steps:g} does not end on an iteration, which takes {updates} optimiser steps; "
                    f"use a multiple of {updates}."
                )


def check_rules(config: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Checks options of a configuration.

    Args:
        config: The configuration.
        rules: (option, whether its value is fine, what is allowed) each.

    Raises:
        ValueError: For the first that is not: what was given and what is allowed.
    """
    for name, fine, allowed in rules:
        if not fine:
            raise ValueError(f"{name}={getattr(config, name)!r} is not allowed: it must be {allowed}.")
