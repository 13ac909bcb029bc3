"""One rollout step, one optimiser step, one evaluation step and one save of a run, counted."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Trainer

from pi_rl.envs.vector_env import EnvSpec
from pi_rl.flow.chain import Chain
from pi_rl.planning.counting import ALLOCATION_UNIT, Count, Meter, planning, without_content
from pi_rl.planning.model import observations
from pi_rl.policies.actor_critic import FlowActorCritic, Sample
from pi_rl.policies.flow_policy import Prefix
from pi_rl.policies.lora import MergedState
from pi_rl.policies.parked import ParkedHead
from pi_rl.rl.losses import clipped_surrogate
from pi_rl.trainer.flow_config import FlowConfig
from pi_rl.trainer.sharding import sharding_units

_PARTS = (
    ("adapters", ("lora_",)),
    ("vision", ("vision_tower", "multi_modal_projector")),
    ("language embedding", ("embed_tokens",)),
    ("language model", ("paligemma.",)),
    ("critic", ("value_head.",)),
    ("noise network", ("noise_network.",)),
)
EXPERT = "action expert"


@dataclass
class Weights:
    """Bytes and numbers of one part's parameters and buffers."""

    parameters: int = 0
    nbytes: int = 0
    trained: int = 0
    trained_nbytes: int = 0


@dataclass
class Phases:
    """Counts of one process on one device.

    Attributes:
        weights: By part.
        parked: Bytes of weights that stay in host memory.
        optimizer: Bytes of the optimiser's state.
        encode: One observation batch of all environments through the VLM (no gradient).
        act: The denoising loop on it, with values.
        value: The value of observations that the policy does not act on, without their encoding.
        forward: A scored micro-batch; with a live prefix its encoding too. Gradients of an earlier one are there.
        backward: Its backward pass.
        step: Clipping and optimiser step.
        evaluate: Deterministic actions of all environments, on a prefix encoded as in the rollout.
        save: Gathering what is written.
        encode_in_update: FLOPs of the forward phase that the VLM takes (0 with a stored prefix).
        rollout_rows: Environments of the process.
        update_rows: Samples of a micro-batch.
        gathered: Bytes of a micro-batch's prefix or observations on the device.
        prefix_row: Bytes of one stored prefix.
        observation_row: Bytes of one stored observation.
        chunk_row: Bytes of one chunk's chain, log-prob, values and critic features.
        checkpoint: Bytes of the saved policy with heads.
        unit_bytes: Largest weights of a module that a sharded model gathers as a whole.
        root_bytes: Weights outside such modules, which are gathered together.
        batch: Bytes of a preprocessed batch of all environments.
    """

    weights: dict[str, Weights] = field(default_factory=dict)
    parked: int = 0
    optimizer: int = 0
    encode: Count = field(default_factory=Count)
    act: Count = field(default_factory=Count)
    value: Count = field(default_factory=Count)
    forward: Count = field(default_factory=Count)
    backward: Count = field(default_factory=Count)
    step: Count = field(default_factory=Count)
    evaluate: Count = field(default_factory=Count)
    save: Count = field(default_factory=Count)
    encode_in_update: int = 0
    rollout_rows: int = 0
    update_rows: int = 0
    gathered: int = 0
    prefix_row: int = 0
    observation_row: int = 0
    chunk_row: int = 0
    checkpoint: int = 0
    unit_bytes: int = 0
    root_bytes: int = 0
    batch: int = 0

    @property
    def acting(self) -> int:
        """Bytes on the device while acting, beside weights, optimiser and stores."""
        return max(self.encode.peak, self.act.peak, self.value.peak) - self.weight_bytes

    @property
    def updating(self) -> int:
        """Bytes of a micro-batch and its passes, beside weights, gradients, optimiser and stores."""
        return max(self.forward.peak, self.backward.peak) - self.forward.before + self.gathered

    @property
    def evaluating(self) -> int:
        """Bytes on the device while evaluating, beside weights, optimiser and stores."""
        prefixes = self.prefix_row * self.rollout_rows
        return self.batch + max(self.encode.temporary, prefixes + self.evaluate.temporary)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers on the device."""
        return sum(part.nbytes for part in self.weights.values())

    @property
    def trained_bytes(self) -> int:
        """Bytes of trained parameters; their gradients take as much."""
        return sum(part.trained_nbytes for part in self.weights.values())


def count_phases(model: FlowActorCritic, args: FlowConfig, spec: EnvSpec, *, gpu: bool) -> Phases:
    """Runs every phase of a run once on tensors without content.

    Args:
        model: On the meta device, as :func:`~pi_rl.planning.model.build_planned` gives it; not usable afterwards.
        args: Of one process: ``num_envs`` are its own environments.
        spec: The environment.
        gpu: Count what a GPU's kernels and allocator would need.
    """
    with planning(gpu=gpu) as mode:
        without_content(model, mode)
        with Meter("cpu", model, unit=ALLOCATION_UNIT if gpu else 1) as meter:
            return run_phases(model, args, spec, meter)


class PhaseMeter(Protocol):
    """What follows the phases: a :class:`~pi_rl.planning.counting.Meter`, or a gauge of real memory."""

    @property
    def live(self) -> int:
        """Bytes in use now."""

    def register(self, tensors: Mapping[str, Tensor]) -> int:
        """Takes note of tensors; returns the bytes that were new."""

    def phase(self) -> AbstractContextManager[Count]:
        """Counts what happens in a block."""

    def backward(self) -> AbstractContextManager[None]:
        """Marks a backward pass."""


def run_phases(model: FlowActorCritic, args: FlowConfig, spec: EnvSpec, meter: PhaseMeter) -> Phases:
    """Runs every phase of a run once.

    Args:
        model: Policy, critic and noise network; its weights change where they have any content.
        args: Of one process.
        spec: The environment.
        meter: Follows what happens.
    """
    return _Run(model, args, spec, meter).counts()


class _Run:
    """The phases in the order of a run, on one meter."""

    def __init__(self, model: FlowActorCritic, args: FlowConfig, spec: EnvSpec, meter: PhaseMeter) -> None:
        self.model, self.args, self.spec, self.meter = model, args, spec, meter
        self.live = model.policy.prefix_is_live
        self.found = Phases(
            rollout_rows=args.num_envs, update_rows=args.per_device_train_batch_size, weights=_weights(model, meter)
        )
        heads = (module for module in model.modules() if isinstance(module, ParkedHead))
        self.found.parked = sum(head.parked.nbytes for head in heads)

    def counts(self) -> Phases:
        found = self.found
        with torch.no_grad():
            sample = self._rollout()
            self._evaluate()
        for _ in range(2):  # the second micro-batch finds the gradients of the first
            self._micro_batch(sample)
        self._optimizer_step()
        with torch.no_grad(), self.meter.phase() as found.save:
            merged = MergedState(self.model.policy.policy)  # type: ignore[arg-type]
            found.checkpoint = sum(merged[name].nbytes for name in merged)  # one at a time, as they are written
        found.unit_bytes, found.root_bytes = _units(self.model)
        return found

    def _rollout(self) -> Sample:
        found, model = self.found, self.model
        model.eval()
        batch = observations(model, self.spec, found.rollout_rows)
        found.batch = sum(tensor.nbytes for tensor in batch.values())
        found.observation_row = _row_bytes(_stored_observation(batch), found.rollout_rows)
        with self.meter.phase() as found.encode:
            self.prefix: Prefix = model("encode", batch=batch)
        prefix = self.prefix
        found.prefix_row = prefix.nbytes // found.rollout_rows
        noise = self._noise(found.rollout_rows)
        with self.meter.phase() as found.act:
            sample: Sample = model("sample", prefix=prefix, **noise)
        kept = [sample.chain.x, sample.log_prob, sample.values, sample.critic_input]
        found.chunk_row = sum(tensor.nbytes for tensor in kept if tensor is not None) // found.rollout_rows
        if model.value_head is not None:
            self._value(prefix, noise)
        return sample

    def _value(self, prefix: Prefix, noise: Mapping[str, Tensor | None]) -> None:
        head, found = self.model.value_head, self.found
        if head is not None and head.critic == "expert" and not self.model.critic_per_step:
            found.value = found.act  # valued by a whole denoising chain, as one that is acted on
            return
        with self.meter.phase() as found.value:
            self.model("value", prefix=prefix, **({} if head is not None and head.critic == "vlm" else noise))

    def _evaluate(self) -> None:
        x_init = self._noise(self.found.rollout_rows)["x_init"]
        with self.meter.phase() as self.found.evaluate:
            self.model("ode", prefix=self.prefix, x_init=x_init)

    def _micro_batch(self, sample: Sample) -> None:
        found, rows, model = self.found, self.found.update_rows, self.model
        model.train()
        chosen = torch.zeros(rows, dtype=torch.int64)
        chain = Chain(sample.chain.x.index_select(0, chosen), self._scored_step(rows))
        critic_input = None if sample.critic_input is None else sample.critic_input.index_select(0, chosen)
        old = sample.log_prob[:, 0].index_select(0, chosen)
        before = self.meter.live
        inputs: Any
        if self.live:
            inputs = observations(model, self.spec, rows)
        else:
            inputs = _as_gathered(self.prefix.index(chosen))
        found.gathered = self.meter.live - before
        with self.meter.phase() as found.forward:
            score, values = model("score", inputs=inputs, chain=chain, critic_input=critic_input)
            loss, _ = clipped_surrogate(score.log_prob, old, torch.zeros(rows), 0.2, None)
            loss = loss - self.args.entropy_coefficient * score.entropy.mean()
            if values is not None:
                loss = loss + values.square().mean()
        found.encode_in_update = self._encode_flops(found, rows) if self.live else 0
        with self.meter.phase() as found.backward, self.meter.backward():
            loss.backward()

    @staticmethod
    def _encode_flops(found: Phases, rows: int) -> int:
        return found.encode.flops * rows // found.rollout_rows

    def _optimizer_step(self) -> None:
        args, found = self.args, self.found
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class(trained, **settings)
        before = self.meter.live
        with self.meter.phase() as found.step:
            torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            optimizer.step()
        found.optimizer = self.meter.live - before
        optimizer.zero_grad(set_to_none=True)
        self._optimizer = optimizer  # its state stays alive, as in a run

    def _noise(self, rows: int) -> dict[str, Tensor | None]:
        policy, sampler = self.model.policy, self.model.sampler
        shape = (policy.chunk_size, policy.max_action_dim)
        hybrid = sampler.mdp == "hybrid"
        return {
            "x_init": torch.zeros(rows, *shape),
            "eps": torch.zeros(rows, sampler.denoising_steps, *shape),
            "step_index": torch.zeros(rows, dtype=torch.int64) if hybrid else None,
        }

    def _scored_step(self, rows: int) -> Tensor | None:
        return None if self.model.sampler.mdp == "one_layer" else torch.zeros(rows, dtype=torch.int64)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    for part, marks in _PARTS:
        if any(mark in name for mark in marks):
            return part
    return EXPERT


def _weights(model: FlowActorCritic, meter: PhaseMeter) -> dict[str, Weights]:
    parts: dict[str, Weights] = {}
    for name, parameter in model.named_parameters():
        part = parts.setdefault(part_of(name), Weights())
        nbytes = meter.register({name: parameter})
        part.parameters += parameter.numel()
        part.nbytes += nbytes
        if parameter.requires_grad:
            part.trained += parameter.numel()
            part.trained_nbytes += nbytes
    parts.setdefault(EXPERT, Weights()).nbytes += meter.register(dict(model.named_buffers()))
    return parts


def _as_gathered(prefix: Prefix) -> Prefix:
    """The prefix as a store gives it: rows first in memory."""
    fields = dict(prefix.tensors())
    fields["kv"] = fields["kv"].movedim(2, 0).contiguous().movedim(0, 2)
    return Prefix.of(fields)


def _stored_observation(batch: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Tensors and bytes per element in the store of observations, which keeps images as uint8."""
    for tensor in batch.values():
        yield tensor, 1 if tensor.ndim == 4 else tensor.element_size()


def _row_bytes(tensors: Iterator[tuple[Tensor, int]], rows: int) -> int:
    return sum(tensor.numel() * size for tensor, size in tensors) // rows


def _units(model: FlowActorCritic) -> tuple[int, int]:
    """Bytes of the largest module that a sharded model gathers as a whole, and of the weights outside of any."""
    units = sharding_units(model)
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    root = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in inside)
    return max(sum(parameter.nbytes for parameter in unit.parameters()) for unit in units) if units else 0, root
