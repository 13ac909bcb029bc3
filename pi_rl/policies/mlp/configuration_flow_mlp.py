"""LeRobot configuration of the policy type `flow_mlp`."""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamWConfig
from lerobot.utils.constants import ACTION, OBS_STATE


@PreTrainedConfig.register_subclass("flow_mlp")
@dataclass
class FlowMLPConfig(PreTrainedConfig):
    """A flow-matching policy that is a multilayer perceptron; no images, no language.

    `input_features` must hold `observation.state` and `output_features` must hold `action`, one-dimensional both.

    Attributes:
        chunk_size: Predicted horizon H.
        n_action_steps: Executed steps C ≤ H.
        num_inference_steps: Denoising steps K of deployment.
        hidden_sizes: Widths of the hidden layers, at least one.
        feature_dim: Width F of an action token, which the output layer and the noise network read.
        initial_std: Standard deviation of an untrained policy's actions, in normalised units, above 0.
        time_sampling_alpha: α of the Beta distribution of the imitation loss' times, as in π0.
        time_sampling_beta: β of it.
        normalization_mapping: How statistics are applied; features without statistics are left as they are.
        optimizer_lr: Learning rate of LeRobot's imitation training.
        optimizer_weight_decay: Weight decay of it.
        optimizer_grad_clip_norm: Gradient-norm clip of it.
    """

    chunk_size: int = 4
    n_action_steps: int = 4
    num_inference_steps: int = 4
    hidden_sizes: tuple[int, ...] = (64, 64)
    feature_dim: int = 32
    initial_std: float = 0.5
    time_sampling_alpha: float = 1.5
    time_sampling_beta: float = 1.0
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {"STATE": NormalizationMode.MEAN_STD, "ACTION": NormalizationMode.MIN_MAX}
    )
    optimizer_lr: float = 1e-3
    optimizer_weight_decay: float = 1e-4
    optimizer_grad_clip_norm: float = 1.0

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: Naming the field, its value and what is allowed.
        """
        super().__post_init__()
        for name in ("chunk_size", "num_inference_steps", "feature_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(f"n_action_steps={self.n_action_steps} is outside 1 … chunk_size={self.chunk_size}.")
        self.hidden_sizes = tuple(self.hidden_sizes)
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes={self.hidden_sizes} must hold at least one width, all positive.")
        for name in ("initial_std", "time_sampling_alpha", "time_sampling_beta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and finite.")

    def validate_features(self) -> None:
        """Checks that there is one state and one action, both vectors, and nothing else to look at.

        Raises:
            ValueError: Naming the feature and the remedy.
        """
        for key, features in ((OBS_STATE, self.input_features), (ACTION, self.output_features)):
            feature = (features or {}).get(key)
            if feature is None or len(feature.shape) != 1:
                found = "missing" if feature is None else f"of shape {tuple(feature.shape)}"
                raise ValueError(f"A flow_mlp policy needs the vector feature {key!r}; it is {found}.")
        if self.image_features:
            raise ValueError(
                f"A flow_mlp policy sees no images, but its features include {sorted(self.image_features)}; "
                "leave them out, or use pi0_small."
            )

    @staticmethod
    def vector_features(state_dim: int, action_dim: int) -> dict[str, Any]:
        """The `input_features` and `output_features` of a state and an action of these sizes."""
        return {
            "input_features": {OBS_STATE: PolicyFeature(type=FeatureType.STATE, shape=(state_dim,))},
            "output_features": {ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(action_dim,))},
        }

    @property
    def observation_delta_indices(self) -> None:
        """Only the present observation is read."""
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """The H actions from the present one on."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """Rewards are not read."""
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        """AdamW for LeRobot's imitation training."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> None:
        """No schedule."""
        return None
