"""Writes complete, untrained `flow_mlp` policies in LeRobot's folder layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.factory import make_pre_post_processors

from pi_rl.policies.checkpoints import save_policy
from pi_rl.policies.mlp.configuration_flow_mlp import FlowMLPConfig
from pi_rl.policies.mlp.modeling_flow_mlp import FlowMLPPolicy


def create_mlp_policy(
    *,
    state_dim: int,
    action_dim: int,
    chunk_size: int,
    n_action_steps: int,
    denoising_steps: int,
    output_dir: str | Path,
    seed: int,
    hidden: Sequence[int] = (64, 64),
    dataset_stats: dict[str, dict[str, Any]] | None = None,
    **fields: Any,
) -> Path:
    """Writes an untrained policy that LeRobot and `load_policy` can load.

    Args:
        state_dim: Size of `observation.state`.
        action_dim: Size of an action, A.
        chunk_size: Predicted horizon H.
        n_action_steps: Executed steps C ≤ H.
        denoising_steps: Deployment denoising steps K.
        output_dir: Folder to write.
        seed: Seed of the weights.
        hidden: Widths of the hidden layers.
        dataset_stats: Statistics by feature key: "observation.state" needs `mean` and `std`, "action" needs `min` and
            `max` (see `action_bounds`). A feature without statistics is left as it is.
        **fields: Further fields of `FlowMLPConfig`.

    Returns:
        `output_dir` as an absolute path.

    Raises:
        ValueError: If an argument is outside what the model allows.
    """
    config = FlowMLPConfig(
        device="cpu",
        push_to_hub=False,
        chunk_size=chunk_size,
        n_action_steps=n_action_steps,
        num_inference_steps=denoising_steps,
        hidden_sizes=tuple(hidden),
        **FlowMLPConfig.vector_features(state_dim, action_dim),
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = FlowMLPPolicy(config)
    preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=dataset_stats)
    return save_policy(output_dir, policy, preprocessor, postprocessor)


def action_bounds(low: Sequence[float], high: Sequence[float]) -> dict[str, dict[str, torch.Tensor]]:
    """Statistics under which normalised actions in [-1, 1] fill an environment's bounds.

    Args:
        low: Lower bounds, (A,).
        high: Upper bounds, (A,).
    """
    return {"action": {"min": torch.tensor(low), "max": torch.tensor(high)}}
