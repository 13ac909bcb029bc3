"""Many tasks in one process: what a task holds is freed with its last simulator, and made again to the bit."""

import numpy as np
import psutil
import pytest

from pi_rl.envs.metaworld_options import task_groups
from pi_rl.envs.registry import make_env

FAST = {"image_size": 32, "fast_rendering": True, "hide_arm": True}
TASKS = ["drawer-open-v3", "pick-place-v3"]


@pytest.fixture
def backend(metaworld):
    made = metaworld.MetaWorldBackend(TASKS, FAST)
    yield made
    made.close()


def observe(sim, state_id, seed):
    """First and later images and physics of an episode."""
    seen = []
    sim.reset(state_id)
    for action in np.random.default_rng(seed).uniform(-1, 1, (6, 4)).astype(np.float32):
        image = np.zeros((32, 32, 3), np.uint8)
        sim.draw({"observation.image": image})
        seen += [image, sim.state, sim.data.qpos.copy(), sim.raw_obs.copy()]
        sim.step(action)
    return seen


@pytest.mark.parametrize("task", range(len(TASKS)), ids=TASKS)
def test_a_scene_goes_with_its_last_simulator_and_comes_back_the_same(backend, task):
    scene = backend._scenes[task]
    first, second = backend.make(task), backend.make(task)
    before = [observe(first, 3, 0), observe(second, 4, 1)]
    model = scene.model
    first.close()
    first.close()  # again does nothing
    assert scene.model is model
    again = observe(second, 4, 1)
    second.close()
    assert scene.model is None
    assert not scene._renderers
    third, fourth = backend.make(task), backend.make(task)
    assert scene.model is not model
    rebuilt = [observe(third, 3, 0), observe(fourth, 4, 1)]
    for seen, expected in zip((again, *rebuilt), (before[1], *before), strict=True):
        for one, other in zip(seen, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_closing_one_scene_leaves_the_others_pictures_alone(backend):
    open_sim = backend.make(0)
    before = observe(open_sim, 5, 0)
    other = backend.make(1)
    observe(other, 5, 0)
    other.close()
    for one, expected in zip(observe(open_sim, 5, 0), before, strict=True):
        np.testing.assert_array_equal(one, expected)


@pytest.mark.slow
def test_memory_stays_bounded_while_all_tasks_take_turns():
    """MT50 by one environment: unbounded, a task holds more than 100 MB, 5.8 GB in all."""
    tasks = task_groups()["mt50"]
    with make_env("metaworld:mt50", 1, 1, **FAST) as env:
        first = {task: env.reset(np.array([[task, 0]]))["observation.image"].copy() for task in range(12)}
        worker = psutil.Process(env.worker_reports()[0]["pid"])
        after_twelve = worker.memory_info().rss / 1e9
        for task in range(12, len(tasks)):
            env.reset(np.array([[task, 0]]))
        assert worker.memory_info().rss / 1e9 < max(2.2, 1.4 * after_twelve)
        for task, image in first.items():
            np.testing.assert_array_equal(env.reset(np.array([[task, 0]]))["observation.image"], image)
