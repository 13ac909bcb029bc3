"""What reinforcement learning needs from a flow-matching policy: a prefix per observation and a velocity field.

Notation: B samples, H predicted horizon, C executed steps, D padded action dims, A real action dims, S prefix tokens,
L layers. Time t runs from 1 (noise) to 0 (action); the velocity is noise − action.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_BATCH_AXIS = {"kv": 2}  # every other field has the batch first


@dataclass
class Prefix:
    """Everything the action expert and the critic need to know about B observations.

    With a frozen VLM it depends on the observation alone, so it is computed once in the rollout and reused by the
    update (paper section 4: only the action expert is trained). With LoRA on the VLM (section 5.5) it changes with
    the weights, and the update computes it anew, with gradients.

    Attributes:
        kv: Keys and values of the prefix tokens, (L, 2, B, kv heads, S, head dim).
        pad_mask: True at valid prefix tokens, (B, S) bool.
        pooled: Mean of the VLM's output over the valid tokens, (B, Dv) float32, or None where nobody reads it.
        state: Normalised, zero-padded proprioception, (B, max_state_dim), or None when the prefix contains it.
    """

    kv: Tensor
    pad_mask: Tensor
    pooled: Tensor | None
    state: Tensor | None = None

    def __len__(self) -> int:
        """Number of observations B."""
        return self.pad_mask.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of all tensors in bytes."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (field name, tensor) for every field that is present."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field.name, tensor

    def index(self, indices: Tensor) -> "Prefix":
        """Selects observations.

        Args:
            indices: (n,) int64 sample indices (repeats allowed) or a (B,) bool mask.

        Returns:
            A prefix of n observations (copies, never views).
        """
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        indices = indices.to(self.pad_mask.device)
        return Prefix.of({name: tensor.index_select(batch_axis(name), indices) for name, tensor in self.tensors()})

    @staticmethod
    def of(fields: Mapping[str, Tensor]) -> "Prefix":
        """The prefix with these fields; those left out are absent."""
        return Prefix(fields["kv"], fields["pad_mask"], fields.get("pooled"), fields.get("state"))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Prefix":
        """Returns the prefix on another device."""
        return Prefix.of({name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors()})

    @staticmethod
    def cat(pieces: Sequence["Prefix"]) -> "Prefix":
        """Concatenates prefixes with the same token count S along the batch.

        Raises:
            ValueError: If `pieces` is empty or the pieces differ in S, or in which fields they have.
        """
        if not pieces:
            raise ValueError("Prefix.cat got no pieces; pass at least one Prefix.")
        lengths = sorted({piece.pad_mask.shape[1] for piece in pieces})
        if len(lengths) > 1:
            raise ValueError(
                f"Prefix.cat got token counts {lengths}; all pieces need the same one. Encode with the same cameras "
                "and the same language length."
            )
        present = [sorted(name for name, _ in piece.tensors()) for piece in pieces]
        if any(names != present[0] for names in present):
            raise ValueError(f"Prefix.cat got pieces with fields {present}; encode all of them in the same way.")
        return Prefix.of(
            {
                name: torch.cat([getattr(piece, name) for piece in pieces], dim=batch_axis(name))
                for name, _ in pieces[0].tensors()
            }
        )


def batch_axis(name: str) -> int:
    """Axis of a `Prefix` field that counts observations."""
    return _BATCH_AXIS.get(name, 0)


class FlowPolicy(nn.Module, abc.ABC):
    """A flow-matching policy: a prefix per observation, frozen or live, and a trainable action expert.

    Attributes:
        is_compiled: Whether `velocity` runs compiled code, which differs with and without gradients.
        prefix_is_live: Whether prefixes depend on trained weights (LoRA on the VLM), so that the update has to encode
            observations again instead of reading stored prefixes.
        chunk_size: Predicted horizon H.
        n_action_steps: Executed steps C ≤ H of every chunk.
        denoising_steps: Deployment default of the denoising steps K.
        action_dim: Real action dims A.
        max_action_dim: Padded action dims D ≥ A.
        feature_dim: Width F of the expert's output tokens.
        pooled_dim: Width Dv of `Prefix.pooled`.
        prefix_state_dim: Width of `Prefix.state`; 0 when the prefix already contains the state.
        state_dim: Size of `observation.state` the policy was built for, or None when it declares none.
        cameras: Feature keys of the images the policy was built for.
    """

    is_compiled: bool = False
    prefix_is_live: bool = False
    chunk_size: int
    n_action_steps: int
    denoising_steps: int
    action_dim: int
    max_action_dim: int
    feature_dim: int
    pooled_dim: int
    prefix_state_dim: int
    state_dim: int | None
    cameras: tuple[str, ...]

    @abc.abstractmethod
    def encode_prefix(self, batch: Mapping[str, Any], *, pooled: bool = True) -> Prefix:
        """Runs the VLM on preprocessed observations in eval mode.

        Gradients flow only where `prefix_is_live` and gradients are enabled; the numbers are the same either way.

        Args:
            batch: Output of the policy's preprocessor for B observations.
            pooled: Whether `Prefix.pooled` is wanted; a policy may compute less without it.

        Returns:
            The prefix of B observations.
        """

    @abc.abstractmethod
    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity field u(x, t) ≈ noise − action, differentiable in the expert's parameters and in a live prefix.

        Args:
            prefix: B observations.
            x: Noisy actions, (B, H, D) float32.
            t: Time in [0, 1], (B,) float32; 1 is noise.

        Returns:
            u (B, H, D) float32, and the expert's output tokens (B, H, F) float32.
        """

    @abc.abstractmethod
    def freeze_vlm(self) -> None:
        """Leaves action expert, projections and LoRA adapters trainable; the VLM stays in eval mode from then on."""

    @abc.abstractmethod
    def compile_velocity(self, *, backend: str = "inductor", mode: str | None = None) -> None:
        """Compiles `velocity` for fixed shapes: the denoising loop and the scored step both run it.

        Args:
            backend: Of `torch.compile`.
            mode: Of `torch.compile`; "reduce-overhead" uses CUDA graphs.
        """

    def checkpoint_activations(self) -> None:
        """Recomputes layers in the backward pass instead of keeping what they computed.

        Raises:
            ValueError: If the policy has no such layers.
        """
        raise ValueError(f"{type(self).__name__} has no layers to recompute; leave gradient_checkpointing out.")

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that receive gradients."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def scored_mask(self) -> Tensor:
        """Elements of a chunk that reach the environment: True at [:C, :A] of an (H, D) bool tensor."""
        device = next(self.parameters()).device
        mask = torch.zeros(self.chunk_size, self.max_action_dim, dtype=torch.bool, device=device)
        mask[: self.n_action_steps, : self.action_dim] = True
        return mask


class EnvironmentSpec(Protocol):
    """The part of an environment's specification that a policy must agree with."""

    @property
    def name(self) -> str:
        """Environment name for messages."""

    @property
    def cameras(self) -> Mapping[str, tuple[int, int]]:
        """(height, width) of every camera by feature key."""

    @property
    def state_dim(self) -> int:
        """Size of `observation.state`."""

    @property
    def action_dim(self) -> int:
        """Size of an action."""


def check_compatibility(policy: FlowPolicy, env_spec: EnvironmentSpec) -> None:
    """Checks that a policy and an environment speak of the same observations and actions.

    Cameras that only the environment has are allowed; the policy ignores them.

    Args:
        policy: The policy.
        env_spec: The environment's specification.

    Raises:
        ValueError: Naming both sides and the remedy, when cameras, state size or action size differ, or when the
            policy executes more steps than it predicts.
    """
    if not 1 <= policy.n_action_steps <= policy.chunk_size:
        raise ValueError(
            f"n_action_steps={policy.n_action_steps} is outside 1 … chunk_size={policy.chunk_size}: a policy cannot "
            f"execute more steps than it predicts. Pass n_action_steps ≤ {policy.chunk_size}."
        )
    missing = [camera for camera in policy.cameras if camera not in env_spec.cameras]
    if missing:
        raise ValueError(
            f"The policy needs camera(s) {missing}, but environment {env_spec.name!r} renders "
            f"{list(env_spec.cameras)}. Use a policy trained on these cameras, or name the "
            f"environment's cameras as the policy does ({list(policy.cameras)})."
        )
    if policy.state_dim is not None and policy.state_dim != env_spec.state_dim:
        raise ValueError(
            f"The policy reads observation.state of size {policy.state_dim}, but environment {env_spec.name!r} gives "
            f"{env_spec.state_dim}. Use a policy fine-tuned on this environment's state."
        )
    if policy.action_dim != env_spec.action_dim:
        raise ValueError(
            f"The policy outputs actions of size {policy.action_dim}, but environment {env_spec.name!r} takes "
            f"{env_spec.action_dim}. Use a policy fine-tuned on this environment's actions."
        )
