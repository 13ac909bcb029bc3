"""Fully sharded data parallelism (FSDP2): every process keeps a part of each weight, gradient and optimiser state.

Accelerate decides whether a run is sharded (its launch file); what is sharded together is decided here, before
Accelerate prepares the model, because a rollout or an evaluation may come before training does. The units are the
layers of action expert, language model and vision tower, and the token embedding; what remains is one more. A unit is
gathered when its module is called, so everything that computes has to be called as a module inside
`FlowActorCritic.forward`, and all processes have to make the same calls.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from lerobot.processor import DeviceProcessorStep
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer, TrainingArguments

from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.checkpoints import LoadedPolicy
from pi_rl.policies.execution import Execution
from pi_rl.trainer.flow_config import FlowConfig

UNITS = ("_PiGemmaDecoderLayerBase", "SiglipEncoderLayer", "Embedding")
"""Classes of the modules whose weights are gathered together, subclasses included."""


def sharding_requested(args: TrainingArguments) -> bool:
    """Whether the launch file (or ``fsdp``) asks for a sharded model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or args.fsdp_plugin_args is not None


def check_sharding(args: FlowConfig, plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuses what a sharded model cannot do here.

    Raises:
        ValueError: Naming the setting of the launch file or of the run, and what to use instead.
    """
    offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    rules = (
        ("fsdp_version", plugin.fsdp_version == 2, plugin.fsdp_version, "2"),
        ("fsdp_offload_params", not offloaded, True, "false: rollouts read every weight in every step"),
        ("fsdp_cpu_ram_efficient_loading", not plugin.cpu_ram_efficient_loading, True, "false: pi_rl loads by itself"),
        (
            "fsdp_activation_checkpointing",
            not plugin.activation_checkpointing,
            True,
            "false: use pi_rl's gradient_checkpointing=true",
        ),
        ("torch_compile", not args.torch_compile, True, "false with a sharded model; use DDP to compile"),
    )
    for name, fine, given, allowed in rules:
        if not fine:
            raise ValueError(f"{name}={given} is not allowed: it must be {allowed}. See recipes/accelerate.")


def shard_model(model: nn.Module, device: torch.device) -> None:
    """Shards a model in place over all processes; its weights move to the device unit by unit.

    Floating types may be mixed within a unit (a frozen bfloat16 matrix beside a trained float32 norm): each tensor is
    gathered in its own, and nothing is converted. Trained tensors are float32, so gradients are summed in float32.
    Afterwards ``load_state_dict`` takes whole tensors, of which every process keeps its part.

    Args:
        model: On the CPU, with the same weights on every process.
        device: This process's device.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in (*sharding_units(model), model):
        # also the root: what stays gathered after a rollout would hide weights that are loaded later
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        module.register_load_state_dict_pre_hook(_take_whole_tensors)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` has sharded a model."""
    return isinstance(model, FSDPModule)


def whole_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The state dict with whole tensors on the CPU, gathered one after the other; a collective call.

    Args:
        model: Sharded or not. Entries that are no parameters (parked weights, buffers) are taken as they are.
        keep: Whether this process wants them; others take part and get an empty dict.
    """
    gathered = {}
    for name, tensor in model.state_dict().items():
        whole = _whole(tensor)
        if keep:
            gathered[name] = whole.detach().cpu()
    return gathered


def whole_optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """The optimiser's state dict with whole tensors on the CPU, as an unsharded run's; a collective call.

    Args:
        optimizer: Of a sharded model.
        keep: Whether this process wants it; others take part and get an empty dict.
    """
    state = optimizer.state_dict()
    gathered: dict[int, dict[str, Any]] = {}
    for index in sorted(state["state"]):
        entries = {key: _whole(value) for key, value in sorted(state["state"][index].items())}
        if keep:
            gathered[index] = {
                key: value.cpu() if isinstance(value, Tensor) else value for key, value in entries.items()
            }
    return {"state": gathered, "param_groups": state["param_groups"]} if keep else {}


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Gives an optimiser its part of a state with whole tensors: all of them where the model is not sharded.

    Args:
        optimizer: Of a sharded model or not.
        state: What `whole_optimizer_state` or an unsharded run wrote; the same on every process.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        index: {key: _part(value, parameters[index]) for key, value in entries.items()}
        for index, entries in state["state"].items()
    }
    optimizer.load_state_dict({"state": parts, "param_groups": state["param_groups"]})


def deliver_to(loaded: LoadedPolicy, device: torch.device) -> None:
    """Lets a policy that was loaded on the CPU get its inputs on the device where its parts will be."""
    loaded.policy.config.device = str(device)
    for step in loaded.preprocessor.steps:
        if isinstance(step, DeviceProcessorStep):
            step.device = str(device)
            step.__post_init__()


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights are gathered together: layers and embeddings. The rest is one unit more."""
    return [part for part in model.modules() if any(parent.__name__ in UNITS for parent in type(part).__mro__)]


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _part(whole: Any, like: nn.Parameter) -> Any:
    """This process's part of a value that every process has, where it is a tensor like a sharded parameter."""
    if not (isinstance(like, DTensor) and isinstance(whole, Tensor) and whole.shape == like.shape):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _take_whole_tensors(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if (key := f"{prefix}{name}") in state_dict and not isinstance(state_dict[key], DTensor):
            state_dict[key] = _part(state_dict[key], parameter)


class ShardedTrainer(Trainer):
    """A Trainer whose model may be sharded by `shard_model` right after construction."""

    args: Any
    optimizer: Any
    _sharded_groups: list[list[nn.Parameter]] | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Lets a sharded run on CPUs take the same path as one on GPUs: Accelerate knows FSDP on GPUs only."""
        super().create_accelerator_and_postprocess()
        if not sharding_requested(self.args):
            return
        state = self.accelerator.state
        if state.distributed_type == DistributedType.NO:
            raise ValueError(
                "FSDP was asked for, but this is a single process without a process group; start it with "
                "`accelerate launch --config_file recipes/accelerate/fsdp_8gpu.yaml --num_processes 1 …`."
            )
        if self.accelerator.device.type == "cpu":
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            self.is_fsdp_enabled = True
        check_sharding(self.args, state.fsdp_plugin)
        # whole gradients would otherwise wait on every process for the last micro-batch of a minibatch
        self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def shard(self, model: FlowActorCritic) -> None:
        """Shards the model if the run asks for it; before an optimiser or anything else holds its parameters."""
        if not self.is_fsdp_enabled:
            return
        model.execution = self.same_passes(model.execution)
        shard_model(model, self.accelerator.device)

    def same_passes(self, execution: Execution) -> Execution:
        """Settings with which processes of a sharded model make equally many passes, whatever rows they have.

        One pass for any number of samples, of the VLM as of the expert.
        """
        if not self.is_fsdp_enabled or execution.encode_rows is None:
            return execution
        return dataclasses.replace(execution, encode_rows=execution.expert_rows)

    def rows_at_once(self, asked: int | None = None, stages: int = 1) -> int | None:
        """Rows of a call of the policy that make one pass of the network, however many of them are in use.

        Passes of a sharded model are collective, and processes differ in the rows that they have.

        Args:
            asked: What the run asks for; None leaves it open.
            stages: Number of parts that the environments of a process act in.
        """
        fixed = self.model.execution.expert_rows if self.is_fsdp_enabled else None
        if fixed is None:
            return asked
        return min(fixed, asked or self.args.num_envs // self.args.world_size // stages)

    def agree(self, flag: bool) -> bool:
        """Whether the flag is true on any process, where processes have to make the same calls of a sharded model.

        Without sharding the flag itself: rollouts and evaluations of whole models need no other process.
        """
        if not self.is_fsdp_enabled or self.accelerator.num_processes == 1:
            return flag
        shared = torch.tensor(int(flag), device=self.accelerator.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared.item())

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Creates the schedule, after giving the optimiser back the parameters that Accelerate took out.

        It identifies a sharded parameter by the address of its part, and all empty parts have the same.
        """
        if self.is_fsdp_enabled and optimizer is None and self._sharded_groups is not None:
            for group, parameters in zip(self.optimizer.param_groups, self._sharded_groups, strict=True):
                group["params"] = list(parameters)
        return super().create_scheduler(num_training_steps, optimizer)

    def _remember_parameters(self) -> None:
        """Called when the optimiser has been created."""
        if self.is_fsdp_enabled:
            self._sharded_groups = [list(group["params"]) for group in self.optimizer.param_groups]
