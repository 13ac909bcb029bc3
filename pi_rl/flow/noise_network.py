"""The learned noise of Flow-Noise (paper section 4.1.1)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NoiseNetwork(nn.Module):
    """Standard deviation of every action element from the action expert's output tokens.

    A tanh MLP whose squashed output interpolates between the two bounds in log space:
    ``std = std_min * (std_max / std_min) ** ((1 + tanh(output)) / 2)``. The last layer starts at zero, so a new
    network gives the geometric mean of the bounds everywhere. The published "log-variance" bounds (.08 to .16 and .04
    to .10) are the standard deviations to pass here.

    Whether the gradient reaches the expert through ``features`` is the caller's choice: nothing is detached here.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        std_min: float,
        std_max: float,
        hidden: Sequence[int] = (128, 64, 32),
    ) -> None:
        """Create the network.

        Args:
            feature_dim: F, width of the expert's output tokens (1024 for the published models).
            action_dim: D, padded action dimensions.
            std_min: Lower bound of the std, in normalised action units, positive.
            std_max: Upper bound of the std, at least ``std_min``.
            hidden: Widths of the hidden layers.

        Raises:
            ValueError: If a size is not positive or the bounds are not ``0 < std_min <= std_max``.
        """
        super().__init__()
        if not 0.0 < std_min <= std_max or math.isinf(std_max):
            raise ValueError(f"got std_min={std_min}, std_max={std_max}; they must satisfy 0 < std_min <= std_max")
        sizes = [feature_dim, *hidden, action_dim]
        if min(sizes) < 1:
            raise ValueError(f"layer sizes {sizes} (features, hidden, action dims) must all be at least 1")
        self.std_min = std_min
        self.std_max = std_max
        layers: list[nn.Module] = []
        for width_in, width_out in zip(sizes[:-2], sizes[1:-1], strict=True):
            layers += [nn.Linear(width_in, width_out), nn.Tanh()]
        head = nn.Linear(sizes[-2], action_dim)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.layers = nn.Sequential(*layers, head)

    def forward(self, features: Tensor) -> Tensor:
        """Standard deviations, in float32 also under autocast.

        Args:
            features: (B, H, F), any floating type.

        Returns:
            (B, H, D) float32 in [std_min, std_max].
        """
        with torch.autocast(device_type=features.device.type, enabled=False):
            fraction = 0.5 * (1.0 + torch.tanh(self.layers(features.float())))
            log_min, log_max = math.log(self.std_min), math.log(self.std_max)
            # the clamp only removes the rounding of exp at the two ends
            return (log_min + (log_max - log_min) * fraction).exp().clamp(self.std_min, self.std_max)
