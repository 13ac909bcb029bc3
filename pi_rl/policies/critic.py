"""The critics of the paper's section 4.3.2: V_vlm on the VLM's output, V_expert on the action expert's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pi_rl.policies.flow_policy import FlowPolicy, Prefix

CRITICS = ("vlm", "expert")
PUBLISHED_HIDDEN_SIZES = (1024, 512, 256)
_LAST_LAYER_STD = 0.01


class ValueHead(nn.Module):
    """MLP from a critic's features to values.

    ``vlm`` reads the mean valid prefix token, followed by the state where the prefix does not contain it (π0).
    ``expert`` reads the mean action token of the expert's output at every denoising step; the value of an observation
    is the mean over the steps (Eq. 16), that of a denoising state its own step's alone. The rollout keeps these
    features and the update reads the same ones, so both use one estimator, whichever step the update scores.

    Features are constants: no gradient reaches the policy. Everything runs in float32, also under autocast.

    Args:
        policy: The policy whose observations are valued; only its sizes are read.
        hidden_sizes: Hidden widths; the published four-layer head has (1024, 512, 256), its one-layer ablation ().
        critic: One of ``CRITICS``.

    Raises:
        ValueError: If the critic is unknown or a hidden size is not positive.
    """

    def __init__(
        self, policy: FlowPolicy, hidden_sizes: Sequence[int] = PUBLISHED_HIDDEN_SIZES, critic: str = "vlm"
    ) -> None:
        super().__init__()
        if critic not in CRITICS:
            raise ValueError(f"critic={critic!r} is unknown; choose one of {', '.join(CRITICS)}.")
        if any(size < 1 for size in hidden_sizes):
            raise ValueError(f"hidden_sizes={tuple(hidden_sizes)} must be positive; () is a one-layer head.")
        self.critic = critic
        self.state_dim = policy.prefix_state_dim
        width = policy.feature_dim if critic == "expert" else policy.pooled_dim + policy.prefix_state_dim
        sizes = [width, *hidden_sizes]
        layers: list[nn.Module] = []
        for width_in, width_out in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        last = nn.Linear(sizes[-1], 1)
        nn.init.normal_(last.weight, std=_LAST_LAYER_STD / sizes[-1] ** 0.5)  # values start near 0
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def observe(self, prefix: Prefix, features: Sequence[Tensor] = ()) -> Tensor:
        """What the critic reads, without gradient.

        Args:
            prefix: B observations.
            features: The expert's output tokens (B, H, F) at each denoising step; ``vlm`` does not need them.

        Returns:
            (B, V, width) float32: V = 1 for ``vlm``, one entry per denoising step for ``expert``.

        Raises:
            ValueError: If the prefix has no pooled output or its state does not fit `state_dim`, or ``expert`` gets no
                features.
        """
        if self.critic == "expert":
            if not features:
                raise ValueError("critic 'expert' needs the expert's output tokens of at least one denoising step.")
            return torch.stack([step.detach().float().mean(dim=1) for step in features], dim=1)
        if prefix.pooled is None:
            raise ValueError("critic 'vlm' needs Prefix.pooled; encode the observations with pooled=True.")
        width = 0 if prefix.state is None else prefix.state.shape[-1]
        if width != self.state_dim:
            raise ValueError(
                f"ValueHead was built for a state of size {self.state_dim}, the prefix has {width}; "
                "build it from the policy that encoded the prefix."
            )
        inputs = prefix.pooled if prefix.state is None else torch.cat([prefix.pooled, prefix.state], dim=-1)
        return inputs.detach().float().unsqueeze(1)

    def per_entry(self, critic_input: Tensor) -> Tensor:
        """Values of every entry: (B, V, width) → (B, V) float32."""
        with torch.autocast(device_type=critic_input.device.type, enabled=False):
            return self.layers(critic_input).squeeze(-1)

    def forward(self, critic_input: Tensor) -> Tensor:
        """Values of B observations, the mean over the entries: (B, V, width) → (B,) float32."""
        return self.per_entry(critic_input).mean(dim=1)
