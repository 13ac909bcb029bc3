"""Which environments are simulated together, and which pass through the network together."""

from dataclasses import dataclass, field

import numpy as np

from pi_rl.envs.vector_env import Observation


@dataclass
class Stage:
    """Environments that are simulated while the policy infers for those of another stage.

    Attributes:
        blocks: Environments of each pass of the network; together they are the stage's, in order.
        observation: The last one in which this stage's rows are up to date.
        simulated: Environments in the chunk that was started and is not finished.
    """

    blocks: list[np.ndarray]
    observation: Observation = field(default_factory=dict)
    simulated: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def make_stages(num_envs: int, pipeline_stages: int, inference_batch_size: int | None) -> list[Stage]:
    """Stages of consecutive environments; arguments as for `check_stages`, which they have passed."""
    per_pass = inference_batch_size or num_envs // pipeline_stages
    return [
        Stage(np.split(rows, range(per_pass, len(rows), per_pass)))
        for rows in np.split(np.arange(num_envs), pipeline_stages)
    ]


def check_stages(num_envs: int, group_size: int, pipeline_stages: int, inference_batch_size: int | None) -> None:
    """Stages are equally large and hold whole groups; a pass of the network serves environments of one stage.

    Args:
        num_envs: Environments of a process.
        group_size: Environments of a group, which divides them.
        pipeline_stages: 1 or 2.
        inference_batch_size: Environments of one pass; None means those of a stage.

    Raises:
        ValueError: With numbers that would do.
    """
    if pipeline_stages not in (1, 2):
        raise ValueError(f"pipeline_stages={pipeline_stages} is not allowed: it must be 1 or 2.")
    step = pipeline_stages * group_size
    if num_envs % step:
        lower = max(num_envs // step, 1) * step
        groups = f" with groups of {group_size}" if group_size > 1 else ""
        raise ValueError(
            f"{num_envs} environments per process{groups} do not divide into {pipeline_stages} equal stages; use "
            f"{lower} or {lower + step} per process, or pipeline_stages=1."
        )
    most = num_envs // pipeline_stages
    if inference_batch_size is not None and not 1 <= inference_batch_size <= most:
        raise ValueError(
            f"inference_batch_size={inference_batch_size} must be from 1 to {most}, the environments of a stage of a "
            "process; leave it out for all of them."
        )
