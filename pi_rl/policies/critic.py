"""V_vlm, the value head on the frozen VLM's output (paper section 4.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pi_rl.policies.flow_policy import FlowPolicy, Prefix

PUBLISHED_HIDDEN_SIZES = (1024, 512, 256)
_LAST_LAYER_STD = 0.01


class ValueHead(nn.Module):
    """MLP from the mean prefix token to the value of an observation.

    The state is appended when the prefix does not contain it (π0). Inputs are constants: no gradient reaches the
    policy. Everything runs in float32, also under autocast.

    Args:
        policy: The policy whose prefixes are valued; only its sizes are read.
        hidden_sizes: Hidden widths; the published head has (1024, 512, 256), its one-layer ablation has ().

    Raises:
        ValueError: If a hidden size is not positive.
    """

    def __init__(self, policy: FlowPolicy, hidden_sizes: Sequence[int] = PUBLISHED_HIDDEN_SIZES):
        super().__init__()
        if any(size < 1 for size in hidden_sizes):
            raise ValueError(f"hidden_sizes={tuple(hidden_sizes)} must be positive; () is a one-layer head.")
        self.state_dim = policy.prefix_state_dim
        sizes = [policy.pooled_dim + policy.prefix_state_dim, *hidden_sizes]
        layers: list[nn.Module] = []
        for width_in, width_out in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        last = nn.Linear(sizes[-1], 1)
        nn.init.normal_(last.weight, std=_LAST_LAYER_STD / sizes[-1] ** 0.5)  # values start near 0
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, prefix: Prefix) -> Tensor:
        """Values of B observations, (B,) float32.

        Raises:
            ValueError: If the prefix's state does not fit `state_dim`.
        """
        width = 0 if prefix.state is None else prefix.state.shape[-1]
        if width != self.state_dim:
            raise ValueError(
                f"ValueHead was built for a state of size {self.state_dim}, the prefix has {width}; "
                "build it from the policy that encoded the prefix."
            )
        inputs = prefix.pooled if prefix.state is None else torch.cat([prefix.pooled, prefix.state], dim=-1)
        with torch.autocast(device_type=inputs.device.type, enabled=False):
            return self.layers(inputs.detach().float()).squeeze(-1)
