"""The policy folder that supervised fine-tuning starts from: a base model's weights, a dataset's features."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi_rl.trainer.sft_data import ACTION_KEY, NORMALIZATIONS, STATE_KEY, camera_keys

_STATE_PROMPT, _PLAIN_PROMPT = "pi05_prepare_state_tokenizer_processor_step", "smolvla_new_line_processor"


@dataclass(frozen=True, kw_only=True)
class StartSettings:
    """What the fine-tuned policy shall be; None keeps what the base model has.

    Attributes:
        chunk_size: Predicted horizon H.
        n_action_steps: Executed steps C.
        denoising_steps: Deployment denoising steps K.
        normalization: ``"mean_std"`` or ``"quantiles"``, of states and actions.
        state_in_prompt: π0.5 alone: whether the state is written into the prompt, as LeRobot does, or left out, as in
            the paper's LIBERO and ManiSkill runs.
        expert_only: Train the action expert and the projections; the VLM stays as it is.
        dtype: Type of the weights: ``"float32"`` or ``"bfloat16"``.
        gradient_checkpointing: Recompute activations in the backward pass.
    """

    chunk_size: int | None = None
    n_action_steps: int | None = None
    denoising_steps: int | None = None
    normalization: str | None = None
    state_in_prompt: bool | None = None
    expert_only: bool = False
    dtype: str | None = None
    gradient_checkpointing: bool = False


def model_folder(model: str, revision: str | None = None) -> Path:
    """Folder of a LeRobot policy; a Hub id is downloaded.

    Raises:
        ValueError: If it is neither a folder nor a Hub id, or holds no LeRobot policy with its weights in one file.
    """
    from pi_rl.policies.checkpoints import policy_folder

    path = policy_folder(model, revision)
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{model} has no {name}; a policy in LeRobot's layout with unsharded weights is needed.")
    return path.resolve()


def start_config(folder: Path, features: Mapping[str, Mapping[str, Any]], settings: StartSettings) -> Any:
    """LeRobot configuration of the policy to train: the base model's, with the dataset's features and the settings.

    Args:
        folder: The base model.
        features: Features of the dataset by key.
        settings: The settings.

    Returns:
        The configuration.

    Raises:
        ValueError: If the base model is no π0 or π0.5, or a setting does not fit it.
    """
    from lerobot.configs import NormalizationMode, PreTrainedConfig
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from lerobot.policies.pi05.configuration_pi05 import PI05Config
    from lerobot.utils.feature_utils import dataset_to_policy_features

    import pi_rl.policies.small  # noqa: F401  (registers the small policy types)

    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    types = {
        name
        for name, choice in PreTrainedConfig.get_known_choices().items()
        if issubclass(choice, PI0Config | PI05Config)
    }
    if stored.get("type") not in types:
        raise ValueError(f"{folder} has policy type {stored.get('type')!r}; this recipe trains {sorted(types)}.")
    config = PreTrainedConfig.from_pretrained(folder)
    named = dataset_to_policy_features(dict(features))
    config.input_features = {key: named[key] for key in (*camera_keys(features), STATE_KEY) if key in named}
    config.output_features = {key: named[key] for key in (ACTION_KEY,) if key in named}
    if settings.normalization is not None:
        if settings.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization={settings.normalization!r} is unknown; choose {' or '.join(NORMALIZATIONS)}."
            )
        mode = NormalizationMode[settings.normalization.upper()]
        config.normalization_mapping |= {"STATE": mode, "ACTION": mode}
    _set_steps(config, settings)
    if settings.dtype is not None:
        config.dtype = settings.dtype
    config.train_expert_only, config.gradient_checkpointing = settings.expert_only, settings.gradient_checkpointing
    config.freeze_vision_encoder = False
    config.push_to_hub = False
    if settings.state_in_prompt is not None and not isinstance(config, PI05Config):
        raise ValueError("state_in_prompt is for π0.5; π0 gives its state to the action expert.")
    if settings.state_in_prompt is not None and hasattr(config, "state_in_prompt"):
        config.state_in_prompt = settings.state_in_prompt  # of small policies, which make their processors from it
    return config


def write_start_policy(target: Path, folder: Path, config: Any, settings: StartSettings) -> None:
    """Writes a policy folder with the base model's weights (a link), the new configuration and its processors.

    The folder appears complete or not at all; an existing one is replaced.

    Args:
        target: Folder to write.
        folder: The base model.
        config: From :func:`start_config`.
        settings: The settings.

    Raises:
        ValueError: If the base model's preprocessor has no prompt step that ``state_in_prompt`` could exchange.
    """
    from pi_rl.policies.checkpoints import TOKENIZER_FILES, has_tokenizer_files, set_tokenizer_name

    partial = target.with_name(f"{target.name}.new")
    for old in (partial, target):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    os.symlink(folder / "model.safetensors", partial / "model.safetensors")
    config._save_pretrained(partial)
    _write_processors(partial, folder, config)
    if settings.state_in_prompt is not None:
        _exchange_prompt(partial / "policy_preprocessor.json", settings.state_in_prompt)
    if has_tokenizer_files(folder):
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        set_tokenizer_name(partial, str(folder))
    partial.rename(target)


def _set_steps(config: Any, settings: StartSettings) -> None:
    for name, value in (
        ("chunk_size", settings.chunk_size),
        ("n_action_steps", settings.n_action_steps),
        ("num_inference_steps", settings.denoising_steps),
    ):
        if value is not None:
            setattr(config, name, value)
    if config.n_action_steps > config.chunk_size:
        if settings.n_action_steps is not None:
            raise ValueError(
                f"n_action_steps={config.n_action_steps} is more than the chunk_size={config.chunk_size} actions that "
                "the policy predicts; lower the one or raise the other."
            )
        config.n_action_steps = config.chunk_size


def _write_processors(target: Path, folder: Path, config: Any) -> None:
    """The base model's processors, else new ones; lerobot-train puts the dataset's statistics in."""
    files = sorted(folder.glob("policy_*processor*"))
    if {"policy_preprocessor.json", "policy_postprocessor.json"} <= {file.name for file in files}:
        for file in files:
            shutil.copyfile(file, target / file.name)
        return
    from lerobot.policies.factory import make_pre_post_processors

    for pipeline in make_pre_post_processors(config):
        pipeline.save_pretrained(target)


def _exchange_prompt(path: Path, with_state: bool) -> None:
    """Makes π0.5's prompt step the one that writes the state into the prompt, or the one that does not."""
    pipeline = json.loads(path.read_text(encoding="utf-8"))
    wanted = _STATE_PROMPT if with_state else _PLAIN_PROMPT
    prompts = [step for step in pipeline["steps"] if step.get("registry_name") in (_STATE_PROMPT, _PLAIN_PROMPT)]
    if not prompts:
        raise ValueError(f"{path.name} of the base model has no prompt step; leave state_in_prompt out.")
    for step in prompts:
        if step["registry_name"] != wanted:
            step.update(registry_name=wanted, config={})
    path.write_text(json.dumps(pipeline, indent=2), encoding="utf-8")
