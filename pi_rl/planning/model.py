"""The policy that a run would load, at its real size and without its weights."""

import copy
import functools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy_config
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from peft import LoraConfig
from torch import Tensor

from pi_rl.envs.vector_env import EnvSpec
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.checkpoints import CONFIG_FILE, LoadedPolicy, override_steps
from pi_rl.policies.pi import PiFlowPolicy
from pi_rl.policies.untrusted import check_policy_folder
from pi_rl.recipe_arguments import RecipeArguments
from pi_rl.trainer.build import build_actor_critic
from pi_rl.trainer.flow_config import FlowConfig
from pi_rl.trainer.flow_trainer import FlowTrainer

PUBLISHED_HORIZON = {"pi0": 50, "pi05": 10}
"""Predicted actions of the published checkpoints of each model type."""

TOKENS_PER_WORD = 1.2  # of instructions in plain English with PaliGemma's vocabulary of 257,152
PROMPT_FRAME = {"pi0": 2, "pi05": 9}  # <bos> and newline; for π0.5 "Task:", "State:" and "Action:" too
TOKENS_PER_STATE_NUMBER = 4  # a space and up to three digits, each a token of its own


@dataclass
class PlannedPolicy:
    """What is known of a policy before it is loaded.

    Attributes:
        config: LeRobot's configuration: sizes, features, numeric type.
        language_tokens: Tokens of the longest prompt; None for a policy that reads none.
        notes: What was assumed because the checkpoint is not at hand.
    """

    config: PreTrainedConfig
    language_tokens: int | None
    notes: list[str] = field(default_factory=list)


def find_policy(
    recipe: RecipeArguments,
    args: FlowConfig,
    spec: EnvSpec,
    *,
    model_type: str | None = None,
    horizon: int | None = None,
    language_tokens: int | None = None,
) -> PlannedPolicy:
    """The configuration of a recipe's policy: of its folder, of the small policy it would make, or LeRobot's own.

    Args:
        recipe: Names the policy.
        args: Executed and denoising steps.
        spec: The environment's cameras, state, actions and sentences.
        model_type: "pi0" or "pi05" where the checkpoint is not at hand; None reads it off the checkpoint's name.
        horizon: H where the checkpoint is not at hand; None is that of the published checkpoints.
        language_tokens: Tokens of the longest prompt; None counts or estimates them.

    Raises:
        ValueError: If the type cannot be told, or the policy does not fit the steps that are asked for.
    """
    folder = None if recipe.model is None else Path(recipe.model).expanduser()
    notes: list[str] = []
    if folder is None:
        config = _small_config(recipe, args, spec)
    elif (folder / CONFIG_FILE).is_file():
        check_policy_folder(folder)
        config = PreTrainedConfig.from_pretrained(folder)
    else:
        kind = model_type or type_of_name(str(recipe.model))
        steps = horizon or PUBLISHED_HORIZON[kind]
        config = _published_config(kind, steps, spec)
        notes.append(
            f"{recipe.model} is not here: sizes of LeRobot's {kind}, H={steps}, {len(spec.cameras)} camera(s), "
            f"saved in {config.dtype}"
        )
    override_steps(config, args.n_action_steps, args.denoising_steps)
    tokens = None
    if hasattr(config, "tokenizer_max_length"):
        tokens = language_tokens or _prompt_tokens(config, spec, small=folder is None)
        if language_tokens is None and folder is not None:
            notes.append(f"the longest prompt is taken to have {tokens} tokens (language_tokens)")
    return PlannedPolicy(config, tokens, notes)


def type_of_name(name: str) -> str:
    """The model type that a checkpoint's name tells.

    Raises:
        ValueError: If it tells none.
    """
    plain = name.lower().replace(".", "").replace("_", "").replace("-", "").replace("π", "pi")
    kind = next((kind for kind in ("pi05", "pi0") if kind in plain), None)
    if kind is None:
        raise ValueError(
            f"model={name!r} is not a folder with a {CONFIG_FILE}, and its name does not tell whether it is π0 or "
            "π0.5; add --model_type pi0 or --model_type pi05, or give the checkpoint's folder."
        )
    return kind


def build_planned(
    planned: PlannedPolicy,
    args: FlowConfig,
    trainer: type[FlowTrainer],
    peft_config: LoraConfig | None = None,
    *,
    gpu: bool,
    device: str = "meta",
) -> FlowActorCritic:
    """Policy, critic and noise network, through the same code as in a run.

    Args:
        planned: The policy.
        args: Of one process.
        trainer: The algorithm's trainer, which knows its critic.
        peft_config: LoRA of the VLM, or None.
        gpu: Whether the run will have a GPU, which chooses the attention.
        device: "meta" for a plan; elsewhere the weights are random.

    Returns:
        The module in training mode, prepared as a run prepares it; not compiled.
    """
    planned.config.device = None
    critic = trainer.make_critic  # reads nothing of a trainer but its arguments
    with torch.device(device):
        policy = get_policy_class(planned.config.type)(planned.config)
        loaded = LoadedPolicy(policy, cast(Any, None), cast(Any, None), None)
        head = functools.partial(critic, cast(FlowTrainer, SimpleNamespace(args=args)))
        model = build_actor_critic(loaded, _uncompiled(args), peft_config, head)
    model.execution = args.execution(model.policy.prefix_is_live)
    if isinstance(model.policy, PiFlowPolicy):
        model.policy.language_tokens = planned.language_tokens
        model.policy.attention = args.attn_implementation or ("sdpa" if gpu or args.bf16 else "eager")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def _uncompiled(args: FlowConfig) -> FlowConfig:
    plain = copy.copy(args)
    plain.torch_compile = False
    return plain


def observations(model: FlowActorCritic, spec: EnvSpec, rows: int) -> dict[str, Tensor]:
    """A preprocessed batch of zeros with the shapes and types that a run has."""
    policy: Any = model.policy
    batch = {name: torch.zeros(rows, 3, *spec.cameras[name]) for name in policy.cameras}
    batch[OBS_STATE] = torch.zeros(rows, spec.state_dim)
    if isinstance(policy, PiFlowPolicy):
        width = policy.policy.config.tokenizer_max_length
        batch[OBS_LANGUAGE_TOKENS] = torch.zeros(rows, width, dtype=torch.int64)
        batch[OBS_LANGUAGE_ATTENTION_MASK] = torch.ones(rows, width, dtype=torch.bool)
    return batch


def estimated_tokens(kind: str, sentences: Sequence[str], state_dim: int) -> int:
    """Tokens of the longest prompt with PaliGemma's tokenizer, which is not at hand.

    Args:
        kind: "pi0" or "pi05".
        sentences: Instructions.
        state_dim: Numbers of the state in the prompt; 0 where it has none.
    """
    words = max(len(sentence.replace("_", " ").split()) for sentence in sentences)
    return math.ceil(TOKENS_PER_WORD * words) + PROMPT_FRAME[kind] + TOKENS_PER_STATE_NUMBER * state_dim


def _prompt_tokens(config: Any, spec: EnvSpec, *, small: bool) -> int:
    if small:
        return config.tokenizer_max_length  # chosen for these sentences
    kind = "pi05" if "pi05" in config.type else "pi0"
    tokens = estimated_tokens(kind, spec.sentences(), spec.state_dim if kind == "pi05" else 0)
    return min(tokens, config.tokenizer_max_length)


def _published_config(kind: str, horizon: int, spec: EnvSpec) -> Any:
    features = {name: PolicyFeature(type=FeatureType.VISUAL, shape=(3, *size)) for name, size in spec.cameras.items()}
    features[OBS_STATE] = PolicyFeature(type=FeatureType.STATE, shape=(spec.state_dim,))
    return make_policy_config(
        kind,
        device="cpu",
        chunk_size=horizon,
        n_action_steps=horizon,
        input_features=features,
        output_features={ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(spec.action_dim,))},
        push_to_hub=False,
    )


def _small_config(recipe: RecipeArguments, args: FlowConfig, spec: EnvSpec) -> PreTrainedConfig:
    """The small policy's configuration depends on its tokenizer, so it is made, in a folder that is deleted."""
    from pi_rl.policies.small.create import create_small_policy

    with tempfile.TemporaryDirectory() as folder:
        path = create_small_policy(
            recipe.small_model,
            cameras=spec.cameras,
            state_dim=spec.state_dim,
            action_dim=spec.action_dim,
            image_size=recipe.image_resolution,
            chunk_size=recipe.chunk_size,
            n_action_steps=args.n_action_steps or recipe.chunk_size,
            denoising_steps=args.denoising_steps,
            instructions=spec.sentences(),
            output_dir=Path(folder) / "policy",
            seed=0,
            **recipe.small_model_sizes,
        )
        return PreTrainedConfig.from_pretrained(path)
