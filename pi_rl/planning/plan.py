"""The whole plan of a run: from its options to memory, FLOPs and seconds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pi_rl.arguments import parse_recipe_arguments
from pi_rl.envs.registry import check_name_and_options
from pi_rl.envs.vector_env import EnvSpec
from pi_rl.planning.assumptions import OTHER_MB, SIMULATOR_MB, Assumptions
from pi_rl.planning.memory import LIVE, Machine, MemoryPlan, chunks_of_process, plan_memory
from pi_rl.planning.model import build_planned, find_policy
from pi_rl.planning.phases import Phases, count_phases
from pi_rl.planning.scaling import IterationTime, plan_time
from pi_rl.recipe_arguments import RecipeArguments
from pi_rl.trainer.flow_config import FlowConfig
from pi_rl.trainer.flow_grpo_config import FlowGRPOConfig
from pi_rl.trainer.flow_grpo_trainer import FlowGRPOTrainer
from pi_rl.trainer.flow_ppo_config import FlowPPOConfig
from pi_rl.trainer.flow_ppo_trainer import FlowPPOTrainer
from pi_rl.trainer.flow_trainer import FlowTrainer

ALGORITHMS: dict[str, tuple[type[FlowConfig], type[FlowTrainer]]] = {
    "ppo": (FlowPPOConfig, FlowPPOTrainer),
    "grpo": (FlowGRPOConfig, FlowGRPOTrainer),
}


@dataclass
class Question:
    """What is asked beside the run's options.

    Attributes:
        algorithm: A key of ``ALGORITHMS``.
        machine: Where each process runs.
        assumptions: What is not counted.
        model_type: "pi0" or "pi05", where the checkpoint is not at hand and its name does not tell.
        horizon: H of a checkpoint that is not at hand.
        language_tokens: Tokens of the longest prompt.
    """

    algorithm: str
    machine: Machine
    assumptions: Assumptions = field(default_factory=Assumptions)
    model_type: str | None = None
    horizon: int | None = None
    language_tokens: int | None = None


@dataclass
class Plan:
    """What a run will need.

    Attributes:
        question: What was asked.
        args: Options of one process.
        spec: The environment.
        arithmetic: The batch arithmetic, as a run prints it.
        phases: What was counted.
        memory: What must fit.
        time: Seconds of an iteration.
        notes: What was assumed about the policy.
    """

    question: Question
    args: FlowConfig
    spec: EnvSpec
    arithmetic: str
    phases: Phases
    memory: MemoryPlan
    time: IterationTime
    notes: list[str]

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs of one iteration on one device, by phase."""
        phases, args = self.phases, self.args
        chunks = chunks_of_process(args)
        rows, last = phases.rollout_rows, args.num_envs * args.rollout_epochs
        samples = args.update_epochs * chunks * args.sampler().transitions
        per_sample = 1 / phases.update_rows
        recomputed_prefix = phases.encode.flops / rows if self.memory.tier == "recompute" else 0.0
        forward = (phases.forward.flops - phases.encode_in_update) * per_sample
        found = {
            "rollout: prefix": (chunks + last) * phases.encode.flops / rows,
            "rollout: denoising": chunks * phases.act.flops / rows,
            "rollout: values": last * phases.value.flops / rows,
            "update: prefix": samples * (phases.encode_in_update * per_sample + recomputed_prefix),
            "update: forward": samples * forward,
            "update: backward": samples * (phases.backward.flops - phases.backward.recomputed) * per_sample,
            "update: activations recomputed": samples * phases.backward.recomputed * per_sample,
        }
        return {name: value for name, value in found.items() if value}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: bytes, FLOPs and seconds."""
        machine, phases = self.question.machine, self.phases
        return {
            "fits": self.memory.fits,
            "num_gpus": machine.processes,
            "sharded": machine.sharded,
            "device_memory": machine.device_memory,
            "host_memory": machine.host_memory,
            "arithmetic": self.arithmetic,
            "environments_per_process": phases.rollout_rows,
            "rows_per_micro_batch": phases.update_rows,
            "parameters": {name: part.parameters for name, part in phases.weights.items()},
            "trained_parameters": sum(part.trained for part in phases.weights.values()),
            "prefix_bytes_per_observation": phases.prefix_row,
            "memory": self.memory.as_dict(),
            "flops_per_iteration": self.flops,
            "flops_per_row": {
                "encode": phases.encode.flops / phases.rollout_rows,
                "act": phases.act.flops / phases.rollout_rows,
                "update_forward": phases.forward.flops / phases.update_rows,
                "update_backward": phases.backward.flops / phases.update_rows,
                "update_recomputed": phases.backward.recomputed / phases.update_rows,
            },
            "time": self.time.as_dict(),
            "assumptions": self.question.assumptions.described(),
            "notes": self.notes,
        }


def make_plan(words: Sequence[str], question: Question) -> Plan:
    """Plans a run.

    Args:
        words: The run's options, as a recipe's command line takes them.
        question: Where it would run.

    Raises:
        ValueError: If an option does not fit, or the processes cannot share the environments or the batch.
    """
    config_class, trainer_class = ALGORITHMS[question.algorithm]
    recipe, args, spec = run_options(words, config_class)
    if question.machine.sharded is None:
        question.machine.sharded = args.train_vlm and question.machine.processes > 1
    arithmetic = args.arithmetic
    if question.machine.processes > 1:
        share = _share(args, question.machine.processes)
        recipe, args, spec = run_options([*words, *share], config_class)
        arithmetic = f"each of {question.machine.processes} processes: {args.arithmetic}"
    planned = find_policy(
        recipe,
        args,
        spec,
        model_type=question.model_type,
        horizon=question.horizon,
        language_tokens=question.language_tokens,
    )
    machine = question.machine
    model = build_planned(planned, args, trainer_class, recipe.peft_config(), gpu=machine.gpu)
    live = model.policy.prefix_is_live
    phases = count_phases(model, args, spec, gpu=machine.gpu)
    args.n_action_steps = model.policy.n_action_steps
    memory = plan_memory(
        phases, args, machine, question.assumptions, live=live, simulators=_simulators(spec, args, question)
    )
    tier = "device" if memory.tier == LIVE else memory.tier
    time = plan_time(phases, args, spec, machine, question.assumptions, tier)
    notes = [*planned.notes, *_notes(args, live)]
    return Plan(question, args, spec, arithmetic, phases, memory, time, notes)


def run_options(words: Sequence[str], config_class: type[FlowConfig]) -> tuple[RecipeArguments, FlowConfig, EnvSpec]:
    """A run's options and environment, read as a recipe reads them.

    The machine that plans has no part in them: TrainingArguments would otherwise look for its GPUs.

    Args:
        words: The run's command line.
        config_class: Of the algorithm.
    """
    recipe, args = parse_recipe_arguments((RecipeArguments, config_class), argv=[*words, "--use_cpu=true"])
    return recipe, args, check_name_and_options(recipe.env, recipe.env_options)


def _share(args: FlowConfig, processes: int) -> list[str]:
    """Options by which one process has its share of the environments and of the batch."""
    if args.num_envs % processes:
        raise ValueError(
            f"num_envs={args.num_envs} cannot be shared equally by {processes} GPUs; add --num_envs "
            f"{-(-args.num_envs // processes) * processes}."
        )
    words = [f"--num_envs={args.num_envs // processes}"]
    if args.global_batch_size is not None:
        step = args.per_device_train_batch_size * processes
        if args.global_batch_size % step:
            raise ValueError(
                f"global_batch_size={args.global_batch_size} is not a multiple of {step} = "
                f"per_device_train_batch_size={args.per_device_train_batch_size} x {processes} GPUs; change one."
            )
        words.append(f"--global_batch_size={args.global_batch_size // processes}")
    return words


def _simulators(spec: EnvSpec, args: FlowConfig, question: Question) -> float:
    workers = min(args.num_envs, args.env_workers or int(question.assumptions.cores_per_gpu))
    return SIMULATOR_MB.get(spec.name.partition(":")[0].partition("_")[0], OTHER_MB) * 1e6 * workers


def _notes(args: FlowConfig, live: bool) -> list[str]:
    notes = ["only the last observation of a rollout is valued beside those acted on; time limits add some more"]
    if live:
        notes.append("the VLM is trained: no prefix is stored, the update encodes every observation again")
    if args.torch_compile:
        notes.append("counted without torch_compile, which fuses operations: fewer temporaries and kernels")
    return notes
