"""Which LeRobot policies can be fine-tuned, and the flow policy around each."""

from collections.abc import Callable
from typing import Any

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pretrained import PreTrainedPolicy

import pi_rl.policies.small  # noqa: F401  (registers the small policy types)
from pi_rl.policies.flow_policy import FlowPolicy
from pi_rl.policies.mlp.configuration_flow_mlp import FlowMLPConfig

Wrapper = Callable[[Any], FlowPolicy]
"""Puts a LeRobot policy of one type behind the interface; usually a subclass of `FlowPolicy`."""


def _wrap_pi(policy: PreTrainedPolicy) -> FlowPolicy:
    from pi_rl.policies.pi import PiFlowPolicy

    return PiFlowPolicy(policy)


def _wrap_mlp(policy: Any) -> FlowPolicy:
    from pi_rl.policies.mlp.flow_policy import MlpFlowPolicy

    return MlpFlowPolicy(policy)


_WRAPPERS: dict[type[PreTrainedConfig], Wrapper] = {
    PI0Config: _wrap_pi,
    PI05Config: _wrap_pi,
    FlowMLPConfig: _wrap_mlp,
}


def register_flow_policy(config_class: type[PreTrainedConfig], wrapper: Wrapper) -> None:
    """Makes a LeRobot policy type of your own one that can be loaded and fine-tuned.

    Call it where the type is registered with LeRobot, so that importing your package is enough; docs/custom_policy.md
    is an example.

    Args:
        config_class: Configuration class, registered with `PreTrainedConfig.register_subclass`; its subclasses are
            wrapped in the same way unless they are registered themselves.
        wrapper: Called with the policy, which it must hold and not copy.

    Raises:
        ValueError: If LeRobot does not know the class, or it has another wrapper already.
    """
    if config_class not in PreTrainedConfig.get_known_choices().values():
        raise ValueError(
            f"{config_class.__name__} is no policy type of LeRobot; put @PreTrainedConfig.register_subclass('name') "
            "above it."
        )
    if _WRAPPERS.setdefault(config_class, wrapper) is not wrapper:
        raise ValueError(f"{config_class.__name__} has a flow policy already, {_WRAPPERS[config_class]!r}.")


def _wrapper_of(config_class: type) -> Wrapper | None:
    """The wrapper of the class, or of its nearest base that has one."""
    return next((_WRAPPERS[base] for base in config_class.__mro__ if base in _WRAPPERS), None)


def supported_config_types() -> list[str]:
    """Names of the LeRobot policy types that `wrap_policy` takes, sorted."""
    return sorted(name for name, kind in PreTrainedConfig.get_known_choices().items() if _wrapper_of(kind))


def wrap_policy(policy: PreTrainedPolicy) -> FlowPolicy:
    """Puts a LeRobot policy behind the interface that reinforcement learning uses.

    Args:
        policy: π0, π0.5, their small versions, `flow_mlp`, or one of yours after `register_flow_policy`.

    Returns:
        The flow policy; it holds `policy` itself, not a copy.

    Raises:
        ValueError: If the policy is of another type; the message names the supported ones.
    """
    wrapper = _wrapper_of(type(getattr(policy, "config", None)))
    if wrapper is None:
        raise ValueError(
            f"A {type(policy).__name__} cannot be fine-tuned here; supported policy types are "
            f"{', '.join(supported_config_types())}. Another type is added with "
            "pi_rl.policies.wrap.register_flow_policy."
        )
    return wrapper(policy)
