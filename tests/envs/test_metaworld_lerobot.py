"""MetaWorld at full size is LeRobot's environment: image, camera, flip and state."""

import numpy as np
import pytest

from pi_rl.envs.registry import check_name_and_options
from pi_rl.envs.vector_env import IMAGE_KEY

# A fixture moved in the model, a free object with a goal, a wall in front of the camera's view of the goal.
TASKS = ["drawer-open-v3", "pick-place-v3", "reach-wall-v3"]


@pytest.fixture(scope="module")
def lerobot_env(metaworld):
    from tests.envs.lerobot_metaworld import MetaworldEnvInState

    return MetaworldEnvInState


def test_the_default_options_are_lerobots_but_for_the_size():
    spec = check_name_and_options("metaworld:reach-v3", {"image_size": 480})
    assert spec.cameras == {IMAGE_KEY: (480, 480)}
    assert (spec.state_dim, spec.action_dim, spec.fps) == (4, 4, 80)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_pictures_and_states_are_lerobots_to_the_bit(metaworld, lerobot_env, task):
    backend = metaworld.MetaWorldBackend([task], {"image_size": 480})
    sim = backend.make(0)
    sim.reset(11)
    theirs = lerobot_env(sim)
    observation, _ = theirs.reset()
    images = {IMAGE_KEY: np.zeros((480, 480, 3), np.uint8)}
    for actions in [*np.random.default_rng(0).uniform(-1, 1, (2, 5, 4)).astype(np.float32), ()]:
        sim.draw(images)
        np.testing.assert_array_equal(images[IMAGE_KEY], observation["pixels"])
        np.testing.assert_array_equal(sim.state, observation["agent_pos"].astype(np.float32))
        for action in actions:
            sim.step(action)
            # MetaWorld scales an action in its own precision; float32 would move the hand by another 1e-9 m
            theirs._env.step(action.astype(np.float64))
        observation = theirs.observe()
    assert images[IMAGE_KEY].std() > 20
    backend.close()
    theirs.close()


@pytest.mark.slow
def test_the_camera_stands_where_lerobot_moves_it_and_the_image_is_turned(metaworld, lerobot_env):
    backend = metaworld.MetaWorldBackend(["reach-v3"], {"image_size": 480})
    sim = backend.make(0)
    sim.reset(0)
    theirs = lerobot_env(sim)
    observation, _ = theirs.reset()
    np.testing.assert_array_equal(sim.env.model.cam_pos, theirs._env.model.cam_pos)
    unturned = theirs._env.render()
    images = {IMAGE_KEY: np.zeros((480, 480, 3), np.uint8)}
    sim.draw(images)
    np.testing.assert_array_equal(images[IMAGE_KEY], unturned[::-1, ::-1])
    assert not np.array_equal(images[IMAGE_KEY], unturned)
    np.testing.assert_array_equal(images[IMAGE_KEY], observation["pixels"])
    backend.close()
    theirs.close()
