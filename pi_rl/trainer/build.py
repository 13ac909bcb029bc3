"""What a trainer trains: a loaded policy, and policy, critic and noise network in one module."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import DeviceProcessorStep, PolicyProcessorPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pi_rl.flow.noise_network import NoiseNetwork
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.checkpoints import LoadedPolicy, load_policy, override_steps
from pi_rl.policies.critic import ValueHead
from pi_rl.policies.flow_policy import FlowPolicy
from pi_rl.policies.input_storage import RECOMPUTE, InputStorage
from pi_rl.policies.lora import add_lora
from pi_rl.policies.pi import PiFlowPolicy
from pi_rl.policies.wrap import wrap_policy
from pi_rl.trainer.flow_config import FlowConfig
from pi_rl.trainer.sharding import deliver_to, sharding_requested

ADAM_BYTES = 12  # of a trained parameter: its gradient and two moments in float32


def load_model(
    model: str | Path | LoadedPolicy | PreTrainedPolicy,
    args: FlowConfig,
    processors: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline] | None,
) -> LoadedPolicy:
    """The policy and processors that a trainer was given in one of three ways.

    Args:
        model: Hub id or folder, loaded policy, or a LeRobot policy object.
        args: Device and number of executed steps.
        processors: (preprocessor, postprocessor) of a policy object.

    Raises:
        ValueError: When a policy object comes without processors.
    """
    if isinstance(model, str | Path):
        sharded = sharding_requested(args)
        loaded = load_policy(
            model,
            device="cpu" if sharded else args.device,  # what is sharded moves to the device unit by unit
            n_action_steps=args.n_action_steps,
            denoising_steps=args.denoising_steps,
        )
        if sharded:
            deliver_to(loaded, args.device)
        return loaded
    if isinstance(model, LoadedPolicy):
        loaded = model
    elif processors is None:
        raise ValueError(
            "A policy object comes without its processors; pass processors=(preprocessor, postprocessor), or give the "
            "folder or Hub id of a checkpoint, which holds them."
        )
    else:
        loaded = LoadedPolicy(model, *processors, path=None)
    override_steps(loaded.policy.config, args.n_action_steps, args.denoising_steps)
    for step in loaded.preprocessor.steps:
        if isinstance(step, DeviceProcessorStep) and torch.device(step.device).type != args.device.type:
            raise ValueError(
                f"The policy's preprocessor puts its output on {step.device}, training runs on {args.device}; load "
                f"the policy with load_policy(..., device={str(args.device)!r})."
            )
    return loaded


def build_actor_critic(
    loaded: LoadedPolicy,
    args: FlowConfig,
    peft_config: LoraConfig | None = None,
    make_critic: Callable[[FlowPolicy], ValueHead | None] = lambda policy: None,
) -> FlowActorCritic:
    """Policy with frozen or LoRA-adapted VLM, critic and, for learned noise, the noise network.

    Args:
        loaded: Policy and processors.
        args: Sampler and head settings.
        peft_config: LoRA of the VLM, or None.
        make_critic: Builds the algorithm's critic for the policy; none by default, which is enough to act.

    Returns:
        The module that is trained; what is trained is in float32.

    Raises:
        ValueError: If LoRA is asked for a policy without a VLM.
    """
    policy = wrap_policy(loaded.policy)
    policy.freeze_vlm()
    disable_dropout(policy)
    if isinstance(policy, PiFlowPolicy):
        _prepare_vlm(policy, args, peft_config, loaded.origin)
    else:
        vlm_options = {
            "peft_config": peft_config,
            "vlm_dtype": args.vlm_dtype,
            "train_vlm": args.train_vlm or None,
            "attn_implementation": args.attn_implementation,
            "gradient_checkpointing": args.gradient_checkpointing or None,
        }
        for name, value in vlm_options.items():
            if value is not None:
                raise ValueError(
                    f"{name} is about a VLM, and {type(loaded.policy).__name__} has none; leave {name} out."
                )
    for parameter in policy.trainable_parameters():
        parameter.data = parameter.data.float()  # bfloat16 weights would round small updates away
    critic = make_critic(policy)
    noise_network = None
    if args.noise == "flow_noise":
        noise_network = NoiseNetwork(policy.feature_dim, policy.max_action_dim, args.noise_std_min, args.noise_std_max)
    if args.torch_compile:
        policy.compile_velocity(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    encodes_again = policy.prefix_is_live or args.prefix_storage == RECOMPUTE
    return FlowActorCritic(policy, critic, noise_network, args.sampler(), args.execution(encodes_again))


def _own_size(parameter: nn.Parameter) -> int:
    """Elements on this process, which has a part of a sharded parameter."""
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


def build_input_storage(
    model: FlowActorCritic,
    args: FlowConfig,
    agree: Callable[[Tensor], Tensor],
    report: Callable[[str, str], None],
) -> InputStorage:
    """Where the policy's inputs wait for the update; ``agree`` and ``report`` are those of `InputStorage`."""
    trained = sum(_own_size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return InputStorage(
        args.prefix_storage,
        live=model.policy.prefix_is_live,
        folder=args.prefix_storage_dir or args.output_dir,
        processes=int(os.environ.get("LOCAL_WORLD_SIZE", str(args.world_size))),
        reserve=ADAM_BYTES * trained,
        agree=agree,
        report=report,
    )


def _prepare_vlm(policy: PiFlowPolicy, args: FlowConfig, peft_config: LoraConfig | None, origin: str | None) -> None:
    """What is trained of the VLM, its numeric type and its attention."""
    if args.train_vlm and peft_config is not None:
        raise ValueError("train_vlm trains the whole VLM, and LoRA adapts a frozen one; use one of them.")
    policy.attention = args.attention()
    policy.park_language_heads()  # before the cast, which would round them
    # with train_vlm also what stays frozen of it, beside float32 masters
    vlm_dtype = args.vlm_dtype or ("float32" if args.train_vlm else "bfloat16" if args.bf16 else None)
    if vlm_dtype is not None:
        policy.cast_vlm(getattr(torch, vlm_dtype))
    if peft_config is not None:
        add_lora(policy, peft_config, origin)
    if args.train_vlm:
        policy.train_vlm()


def disable_dropout(module: nn.Module) -> None:
    """Switches dropout off everywhere: its masks would make the probability ratio random (paper, appendix C.1)."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for name in ("attention_dropout", "dropout"):  # rates that attention layers keep as numbers
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
