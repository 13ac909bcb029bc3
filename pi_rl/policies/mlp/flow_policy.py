"""The policy type `flow_mlp` as a flow policy."""

from collections.abc import Mapping
from typing import Any

import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from pi_rl.policies.flow_policy import FlowPolicy, Prefix
from pi_rl.policies.mlp.modeling_flow_mlp import FlowMLPPolicy


class MlpFlowPolicy(FlowPolicy):
    """A `flow_mlp` policy behind the flow-policy interface.

    There is no VLM: the prefix is the normalised state, as one token without keys and values, and the critic reads
    that state.

    Args:
        policy: The LeRobot policy.

    Raises:
        ValueError: If `policy` is of another class.
    """

    def __init__(self, policy: FlowMLPPolicy):
        super().__init__()
        if not isinstance(policy, FlowMLPPolicy):
            raise ValueError(
                f"MlpFlowPolicy wraps a FlowMLPPolicy, got {type(policy).__name__}; "
                "use pi_rl.policies.wrap.wrap_policy, which finds the wrapper."
            )
        config = policy.config
        self.policy = policy
        self.chunk_size = config.chunk_size
        self.n_action_steps = config.n_action_steps
        self.denoising_steps = config.num_inference_steps
        self.action_dim = self.max_action_dim = policy.model.action_dim
        self.feature_dim = config.feature_dim
        self.state_dim = self.pooled_dim = config.input_features[OBS_STATE].shape[0]
        self.prefix_state_dim = 0
        self.cameras = ()

    def freeze_vlm(self) -> None:
        """Makes everything trainable: there is no VLM to freeze."""
        self.policy.requires_grad_(True)

    @torch.no_grad()
    def encode_prefix(self, batch: Mapping[str, Any], *, pooled: bool = True) -> Prefix:
        """Wraps the state as a prefix; see `FlowPolicy.encode_prefix`.

        Args:
            batch: Output of the preprocessor: `observation.state` (B, state dim), normalised.
            pooled: Without effect: the state is the prefix, and stands in `Prefix.pooled`.

        Raises:
            ValueError: If the state is missing or has another size.
        """
        state = batch.get(OBS_STATE)
        if state is None or state.ndim != 2 or state.shape[1] != self.state_dim:
            found = "missing" if state is None else f"of shape {tuple(state.shape)}"
            raise ValueError(f"{OBS_STATE} is {found}; it must have shape (B, {self.state_dim}).")
        samples = len(state)
        return Prefix(
            kv=state.new_zeros(0, 2, samples, 1, 1, 1),
            pad_mask=torch.ones(samples, 1, dtype=torch.bool, device=state.device),
            pooled=state.float(),
        )

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and action tokens; see `FlowPolicy.velocity`."""
        assert prefix.pooled is not None
        dtype = self.policy.model.action_out.weight.dtype
        velocity, features = self.policy.model(prefix.pooled.to(dtype), x.to(dtype), t.to(dtype))
        return velocity.float(), features.float()

    def compile_velocity(self, *, backend: str = "inductor", mode: str | None = None) -> None:
        """Compiles the network; see `FlowPolicy.compile_velocity`."""
        self.policy.model.compile(backend=backend, mode=mode, dynamic=False)
        self.is_compiled = True
