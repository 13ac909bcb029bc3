import os

import numpy as np
import pytest

from pi_rl.envs.registry import make_env

FAST = {"image_size": 32, "fast_rendering": True, "hide_arm": True, "max_episode_steps": 60}
TASKS = "handle-press-v3,drawer-open-v3"


@pytest.fixture(scope="session")
def metaworld():
    """The simulator's module, imported when it is needed."""
    from pi_rl.envs import metaworld

    return metaworld


@pytest.fixture(scope="module")
def two_workers():
    with make_env(f"metaworld:{TASKS}", 4, 2, **FAST) as env:
        yield env


@pytest.fixture(scope="module")
def one_worker():
    with make_env(f"metaworld:{TASKS}", 4, 1, **FAST) as env:
        yield env


@pytest.fixture
def actions():
    return np.random.default_rng(0).uniform(-1, 1, (4, 5, 4)).astype(np.float32)


@pytest.fixture(scope="session")
def maniskill_folder():
    """ManiSkill's assets. It reads where they are but once, so all tests that run it in this process need this one."""
    import logging

    from tests.envs.assets import maniskill_assets

    folder = maniskill_assets()
    os.environ["MS_ASSET_DIR"] = str(folder)
    os.environ["MANISKILL_ASSET_DIR"] = str(folder / "carrot_root")
    logging.getLogger("mani_skill").setLevel("ERROR")
    return folder
