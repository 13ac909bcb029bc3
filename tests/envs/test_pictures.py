"""Two different scenes in one process are drawn as each is drawn in a process of its own."""

import numpy as np
import pytest

from pi_rl.envs.registry import make_env
from tests.envs.assets import libero_assets

STATE_IDS = (3, 4)


def drawn(name, tasks, **options):
    """Pictures after a reset and after a chunk, by task: all tasks in one worker, drawn in turns, twice over."""
    with make_env(f"{name}:{','.join(tasks)}", len(tasks), 1, **options) as env:
        ids = np.array([[env.spec.tasks.index(task), state] for task, state in tasks.items()])
        for _ in range(2):  # the second time every renderer has drawn before
            first = env.reset(ids)
            actions = np.random.default_rng(0).uniform(-0.3, 0.3, (1, 2, env.spec.action_dim)).astype(np.float32)
            then = env.step_chunk(np.repeat(actions, len(tasks), 0)).observation
        return {
            task: [observation[camera][row] for observation in (first, then) for camera in env.spec.cameras]
            for row, task in enumerate(tasks)
        }


def check(name, tasks, **options):
    together = drawn(name, dict(zip(tasks, STATE_IDS, strict=True)), **options)
    for task, state in zip(tasks, STATE_IDS, strict=True):
        alone = drawn(name, {task: state}, **options)[task]
        for picture, expected in zip(together[task], alone, strict=True):
            assert picture.std() > 10
            np.testing.assert_array_equal(picture, expected)
    one, other = together.values()
    assert all(not np.array_equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.slow
def test_metaworld_in_full_quality():
    check("metaworld", ("handle-press-v3", "drawer-open-v3"), image_size=224)


@pytest.mark.slow
def test_libero():
    check("libero", ("spatial-0", "object-0"), image_size=128, assets=str(libero_assets()))


@pytest.mark.slow
def test_maniskill(maniskill_folder):
    tasks = ("PutCarrotOnPlateInScene-v1", "PutSpoonOnTableClothInScene-v1")
    check("maniskill", tasks, image_size=(60, 80), assets=str(maniskill_folder))
