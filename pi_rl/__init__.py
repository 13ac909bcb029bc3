"""pi_rl: online RL fine-tuning of flow-matching vision-language-action models (π0, π0.5) with Hugging Face tools.

The names below are loaded on first use, so that ``import pi_rl`` is instant and simulator worker processes, which
import :mod:`pi_rl.envs`, never load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pi_rl.__about__ import __version__

if TYPE_CHECKING:
    from pi_rl.envs.registry import make_env
    from pi_rl.pipeline import recipe_main, run_recipe
    from pi_rl.policies.checkpoints import load_policy
    from pi_rl.recipe_arguments import RecipeArguments
    from pi_rl.rollout.evaluator import evaluate_policy
    from pi_rl.trainer.flow_grpo_config import FlowGRPOConfig
    from pi_rl.trainer.flow_grpo_trainer import FlowGRPOTrainer
    from pi_rl.trainer.flow_ppo_config import FlowPPOConfig
    from pi_rl.trainer.flow_ppo_trainer import FlowPPOTrainer

_HOME = {
    "FlowGRPOConfig": "pi_rl.trainer.flow_grpo_config",
    "FlowGRPOTrainer": "pi_rl.trainer.flow_grpo_trainer",
    "FlowPPOConfig": "pi_rl.trainer.flow_ppo_config",
    "FlowPPOTrainer": "pi_rl.trainer.flow_ppo_trainer",
    "RecipeArguments": "pi_rl.recipe_arguments",
    "evaluate_policy": "pi_rl.rollout.evaluator",
    "load_policy": "pi_rl.policies.checkpoints",
    "make_env": "pi_rl.envs.registry",
    "recipe_main": "pi_rl.pipeline",
    "run_recipe": "pi_rl.pipeline",
}

__all__ = [
    "FlowGRPOConfig",
    "FlowGRPOTrainer",
    "FlowPPOConfig",
    "FlowPPOTrainer",
    "RecipeArguments",
    "__version__",
    "evaluate_policy",
    "load_policy",
    "make_env",
    "recipe_main",
    "run_recipe",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'pi_rl' has no attribute '{name}'; it offers {', '.join(sorted(_HOME))}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
