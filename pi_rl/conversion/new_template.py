"""Configuration and processors for openpi's weights of the published size, where no LeRobot policy is like them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_policy_config, make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE

import pi_rl.policies.small  # noqa: F401  (registers types whose processors take any tokenizer)
from pi_rl.conversion.to_lerobot import Template
from pi_rl.policies.checkpoints import has_tokenizer_files
from pi_rl.policies.weight_files import EMBEDDING, StoredWeights

TOKENIZER = "google/paligemma-3b-pt-224"
_IMAGE_SIZE = 224
_STATE_PROJECTION, _ACTION_PROJECTION = "model.state_proj.weight", "model.action_in_proj.weight"
_ABSOLUTE = "gripper"
_DTYPE = "bfloat16"  # openpi's; `deployment_config` makes it float32 for weights in that


@dataclass(frozen=True, kw_only=True)
class NewPolicy:
    """What openpi keeps in its training configuration, not in the checkpoint.

    Attributes:
        camera: Image features, in the order of openpi's (base, then wrists).
        state_dim: Numbers of the robot's state.
        action_dim: Numbers of an action, A.
        chunk_size: Predicted horizon H, openpi's action_horizon.
        n_action_steps: Executed steps C ≤ H; None is H.
        action_names: Names of the A numbers, if actions are relative to the state (openpi's extra_delta_transform);
            `gripper` stays absolute. None leaves all absolute.
        tokenizer: Folder or Hub id.
        state_in_prompt: π0.5 alone: whether its prompt holds the state; None is yes.
    """

    camera: tuple[str, ...]
    state_dim: int
    action_dim: int
    chunk_size: int
    n_action_steps: int | None = None
    action_names: tuple[str, ...] | None = None
    tokenizer: str = TOKENIZER
    state_in_prompt: bool | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without weights."""
        if self.n_action_steps is not None and self.n_action_steps > self.chunk_size:
            raise ValueError(f"n_action_steps={self.n_action_steps} is above chunk_size={self.chunk_size}.")
        if len(set(self.camera)) != len(self.camera):
            raise ValueError(f"A camera is given twice: {', '.join(self.camera)}.")
        if self.action_names is not None and len(self.action_names) != self.action_dim:
            raise ValueError(f"action_names has {len(self.action_names)} names for action_dim={self.action_dim}.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "NewPolicy":
        """From options of the command line.

        Raises:
            ValueError: If one that is needed is missing, or they do not fit together.
        """
        needed = ("camera", "state_dim", "action_dim", "chunk_size")
        missing = [f"--{name}" for name in needed if name not in options]
        if missing:
            raise ValueError(f"Without --like, {', '.join(missing)} must be given, too.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return cls(**values)


def new_template(kind: str, weights: StoredWeights, policy: NewPolicy) -> Template:
    """LeRobot's configuration and processors for a policy of the published size.

    Args:
        kind: "pi0" or "pi05".
        weights: Its weights; padded sizes are theirs.
        policy: The rest.

    Raises:
        ValueError: If the sizes do not fit the weights, or an option is for the other model.
        RuntimeError: If the tokenizer cannot be loaded.
    """
    if kind == "pi0" and policy.state_in_prompt is not None:
        raise ValueError("state_in_prompt is for π0.5; π0 gives its state to the action expert. Leave it out.")
    padded = _padded_sizes(weights, policy)
    images = {key: PolicyFeature(FeatureType.VISUAL, (3, _IMAGE_SIZE, _IMAGE_SIZE)) for key in policy.camera}
    shared: dict[str, Any] = {
        "device": "cpu",
        "input_features": {**images, OBS_STATE: PolicyFeature(FeatureType.STATE, (policy.state_dim,))},
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (policy.action_dim,))},
        "chunk_size": policy.chunk_size,
        "n_action_steps": policy.n_action_steps or policy.chunk_size,
        "use_relative_actions": policy.action_names is not None,
        "relative_exclude_joints": [_ABSOLUTE],
        "action_feature_names": None if policy.action_names is None else list(policy.action_names),
        "push_to_hub": False,
        **padded,
    }
    config = make_policy_config(kind, dtype=_DTYPE, **shared)
    # LeRobot's own factory knows one tokenizer, and π0.5's no prompt without the state
    prompt = {"state_in_prompt": policy.state_in_prompt is not False} if kind == "pi05" else {}
    stand_in = make_policy_config(
        f"{kind}_small",
        **shared,
        **prompt,
        tokenizer_name=policy.tokenizer,
        tokenizer_max_length=config.tokenizer_max_length,
        vocab_size=weights.tensors[EMBEDDING].shape[0],
    )
    try:
        processors = make_pre_post_processors(stand_in)
    except OSError as error:
        raise RuntimeError(
            f"The tokenizer {policy.tokenizer!r} cannot be loaded: {error}\nAccept its licence and log in to the Hub, "
            "or give a folder with its files (--tokenizer)."
        ) from error
    local = Path(policy.tokenizer).expanduser()
    source = local if has_tokenizer_files(local) else None
    return Template(config, processors, source, "the given options", has_statistics=False)


def _padded_sizes(weights: StoredWeights, policy: NewPolicy) -> dict[str, int]:
    """The sizes to which states and actions are padded; π0.5's weights do not have the state's."""
    widths = {"action_dim": weights.tensors[_ACTION_PROJECTION].shape[1]}
    if _STATE_PROJECTION in weights.tensors:
        widths["state_dim"] = weights.tensors[_STATE_PROJECTION].shape[1]
    for name, width in widths.items():
        if getattr(policy, name) > width:
            raise ValueError(
                f"{name}={getattr(policy, name)} is above the weights' {width}; give the size of the robot's own."
            )
    return {f"max_{name}": width for name, width in widths.items()}
