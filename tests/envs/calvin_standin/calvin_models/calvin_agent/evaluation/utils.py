"""Initial states. Its imports cannot be had, as in the real file."""

import numpy as np
import pyhash
import torch  # noqa: F401

hasher = pyhash.fnv1_32()


def temp_seed(seed):
    raise RuntimeError(f"the one that is given must be used, not this with {seed}")


def get_env_state_for_initial_condition(initial_condition):
    robot_obs = np.linspace(0.1, 0.2, 15)
    scene_obs = np.zeros(24)
    seed = hasher(str(initial_condition.values()))
    with temp_seed(seed):
        yaw = np.random.uniform(0, 1)
    scene_obs[0] = 0.28 * (initial_condition["slider"] == "left")
    scene_obs[1] = 0.22 * (initial_condition["drawer"] == "open")
    scene_obs[4] = initial_condition["lightbulb"]
    scene_obs[5] = initial_condition["led"]
    scene_obs[[6, 12, 18]] = 1, 2, 3  # red, blue, pink
    scene_obs[11] = yaw
    return robot_obs, scene_obs
