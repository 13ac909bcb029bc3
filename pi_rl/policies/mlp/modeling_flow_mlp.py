"""LeRobot policy of type `flow_mlp`: a preconditioned velocity field on a multilayer perceptron.

Shapes: B samples, H horizon, A action dims, S state dims, F token width. Time t runs from 1 (noise) to 0 (action), as
in π0.
"""

import math
from collections import deque
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from pi_rl.policies.mlp.configuration_flow_mlp import FlowMLPConfig

_TIME_FREQUENCIES = 4
_TIME_SCALE, _TIME_OFFSET = 0.999, 0.001  # of the imitation loss' times, as in π0: t = 0 is never needed


class FlowMLP(nn.Module):
    """Velocity u(s, x, t) of action chunks.

    The perceptron does not give the velocity itself but an offset μ(s, x, t), from which

        u = c(t) · (x − (1 − t) μ) − μ,        c(t) = (t − (1 − t) σ²) / (t² + (1 − t)² σ²).

    For a constant μ this is the exact velocity of flow matching on actions N(μ, σ²). The output layer starts at zero,
    so an untrained policy's actions are N(0, σ²) with σ = `initial_std`: a sensible start for learning from rewards
    alone, in which noise injected at any denoising step still shows in the action.

    Args:
        config: Sizes.
    """

    def __init__(self, config: FlowMLPConfig):
        super().__init__()
        self.horizon, self.feature_dim, self.initial_std = config.chunk_size, config.feature_dim, config.initial_std
        self.action_dim = config.output_features[ACTION].shape[0]
        state_dim = config.input_features[OBS_STATE].shape[0]
        widths = [state_dim + self.horizon * self.action_dim + 2 * _TIME_FREQUENCIES, *config.hidden_sizes]
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths, [*widths[1:], self.horizon * self.feature_dim], strict=True):
            layers += [nn.Linear(width_in, width_out), nn.SiLU()]
        self.tokens = nn.Sequential(*layers)
        self.action_out = nn.Linear(self.feature_dim, self.action_dim)
        nn.init.zeros_(self.action_out.weight)
        nn.init.zeros_(self.action_out.bias)

    def forward(self, state: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and action tokens.

        Args:
            state: Normalised states, (B, S).
            x: Noisy actions, (B, H, A).
            t: Times in (0, 1], (B,).

        Returns:
            u (B, H, A) and the tokens that the output layer reads, (B, H, F).
        """
        frequencies = math.pi * 2.0 ** torch.arange(_TIME_FREQUENCIES, dtype=t.dtype, device=t.device)
        angles = t[:, None] * frequencies
        inputs = torch.cat([state, x.flatten(1), angles.sin(), angles.cos()], dim=1)
        features = self.tokens(inputs).unflatten(1, (self.horizon, self.feature_dim))
        offset = self.action_out(features)
        t = t[:, None, None]
        variance = (self.initial_std * (1.0 - t)).square()
        slope = (t - (1.0 - t) * self.initial_std**2) / (t.square() + variance)
        return slope * (x - (1.0 - t) * offset) - offset, features


class FlowMLPPolicy(PreTrainedPolicy):
    """LeRobot policy of type `flow_mlp`.

    Args:
        config: Sizes and features.
        **kwargs: Accepted and unused, as in LeRobot's policies (dataset statistics and the like).
    """

    config_class = FlowMLPConfig
    name = "flow_mlp"

    def __init__(self, config: FlowMLPConfig, **kwargs: Any):
        super().__init__(config)
        config.validate_features()
        self.model = FlowMLP(config)
        self.model.to(config.device)
        self.reset()

    def reset(self) -> None:
        """Forgets the actions that `select_action` still holds; call it when an episode begins."""
        self._queue: deque[Tensor] = deque(maxlen=self.config.n_action_steps)

    def get_optim_params(self) -> Any:
        """All parameters, for LeRobot's imitation training."""
        return self.parameters()

    def forward(self, batch: dict[str, Tensor], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """Flow-matching loss |u(s, x_t, t) − (noise − action)|², mean over what is not padding.

        Args:
            batch: Preprocessed: `observation.state` (B, S), `action` (B, H, A), optionally
                `action_is_pad` (B, H) bool.
            reduction: "mean", or "none" for one loss per sample.

        Returns:
            The () or (B,) loss, and {"loss": its mean}.
        """
        actions = batch[ACTION]
        noise = torch.randn_like(actions)
        config = self.config
        times = torch.distributions.Beta(config.time_sampling_alpha, config.time_sampling_beta).sample((len(actions),))
        t = (times * _TIME_SCALE + _TIME_OFFSET).to(actions)
        mixing = t[:, None, None]
        velocity, _ = self.model(batch[OBS_STATE], mixing * noise + (1.0 - mixing) * actions, t)
        errors = (velocity - (noise - actions)).square().mean(dim=2)
        padding = batch.get("action_is_pad")
        kept = torch.ones_like(errors) if padding is None else (~padding).to(errors.dtype)
        per_sample = (errors * kept).sum(1) / kept.sum(1).clamp(min=1.0)
        loss = per_sample if reduction == "none" else (errors * kept).sum() / kept.sum().clamp(min=1.0)
        return loss, {"loss": loss.detach().mean().item()}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Denoises an action chunk with K Euler steps.

        Args:
            batch: Preprocessed: `observation.state` (B, S).
            **kwargs: `noise` (B, H, A) to start from (standard normal by default), `num_steps` instead of the
                configuration's K.

        Returns:
            Normalised actions, (B, H, A).
        """
        self.eval()
        state = batch[OBS_STATE]
        steps = kwargs.get("num_steps") or self.config.num_inference_steps
        x = kwargs.get("noise")
        if x is None:
            x = torch.randn(len(state), self.model.horizon, self.model.action_dim, device=state.device)
        for i in range(steps):
            t = torch.full((len(state),), (steps - i) / steps, device=state.device)
            x = x - self.model(state, x, t)[0] / steps
        return x

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """The next action, (B, A); a chunk is predicted whenever the previous one is used up."""
        if not self._queue:
            chunk = self.predict_action_chunk(batch, **kwargs)
            self._queue.extend(chunk[:, : self.config.n_action_steps].transpose(0, 1))
        return self._queue.popleft()
