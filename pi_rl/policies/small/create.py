"""Writes complete, untrained small policies in LeRobot's folder layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE

import pi_rl.policies.small  # noqa: F401  (registers the policy types)
from pi_rl.policies.checkpoints import save_policy
from pi_rl.policies.small.tokenizer import longest_prompt, train_tokenizer, training_texts

KINDS = ("pi0", "pi05")
_TOKEN_BLOCK = 8


def create_small_policy(
    kind: str,
    *,
    cameras: Mapping[str, tuple[int, int]] | Sequence[str],
    state_dim: int,
    action_dim: int,
    image_size: int,
    chunk_size: int,
    n_action_steps: int,
    denoising_steps: int,
    instructions: Sequence[str],
    output_dir: str | Path,
    seed: int,
    dataset_stats: dict[str, dict[str, Any]] | None = None,
    **sizes: Any,
) -> Path:
    """Writes an untrained policy that LeRobot and `load_policy` can load.

    State and actions are padded to their true sizes: a small π0 with unused action dims would integrate velocities
    that the imitation loss never trained.

    Args:
        kind: "pi0" or "pi05".
        cameras: Image feature keys such as "observation.image"; a mapping to (height, width) records the sizes.
        state_dim: Size of `observation.state`.
        action_dim: Size of an action, A.
        image_size: Side to which images are resized, in pixels; a multiple of `patch_size` (16).
        chunk_size: Predicted horizon H.
        n_action_steps: Executed steps C ≤ H.
        denoising_steps: Deployment denoising steps K.
        instructions: Task instructions; the tokenizer is trained on them.
        output_dir: Folder to write.
        seed: Seed of the weights.
        dataset_stats: Normalisation statistics by feature key; None leaves state and actions as they are.
        **sizes: Further fields of the configuration, for instance those of `SmallSizes`, or π0.5's `state_in_prompt`.

    Returns:
        `output_dir` as an absolute path.

    Raises:
        ValueError: If an argument is outside what the models allow.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; use one of {KINDS}.")
    if not cameras or not instructions:
        raise ValueError("A small policy needs at least one camera and one instruction.")
    if kind == "pi0" and "state_in_prompt" in sizes:
        raise ValueError("state_in_prompt is for π0.5; π0 gives its state to the action expert. Leave it out.")
    vocab_size = sizes.pop("vocab_size", 512)
    state_in_prompt = kind == "pi05" and sizes.get("state_in_prompt", True)
    tokenizer = train_tokenizer(training_texts(instructions, state_in_prompt), vocab_size)
    longest = longest_prompt(tokenizer, instructions, state_dim if state_in_prompt else 0)
    config = make_policy_config(
        f"{kind}_small",
        **{
            "device": "cpu",
            "input_features": _input_features(cameras, state_dim, image_size),
            "output_features": {ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(action_dim,))},
            "image_resolution": (image_size, image_size),
            "chunk_size": chunk_size,
            "n_action_steps": n_action_steps,
            "num_inference_steps": denoising_steps,
            "max_state_dim": state_dim,
            "max_action_dim": action_dim,
            "vocab_size": vocab_size,
            "tokenizer_max_length": -(-longest // _TOKEN_BLOCK) * _TOKEN_BLOCK,
            "push_to_hub": False,
            **sizes,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = get_policy_class(config.type)(config)
    with TemporaryDirectory() as tokenizer_folder:
        tokenizer.save_pretrained(tokenizer_folder)
        config.tokenizer_name = tokenizer_folder
        preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=dataset_stats)
        return save_policy(output_dir, policy, preprocessor, postprocessor)


def _input_features(
    cameras: Mapping[str, tuple[int, int]] | Sequence[str], state_dim: int, image_size: int
) -> dict[str, PolicyFeature]:
    sizes = cameras if isinstance(cameras, Mapping) else dict.fromkeys(cameras, (image_size, image_size))
    features = {
        key: PolicyFeature(type=FeatureType.VISUAL, shape=(3, height, width)) for key, (height, width) in sizes.items()
    }
    features[OBS_STATE] = PolicyFeature(type=FeatureType.STATE, shape=(state_dim,))
    return features
