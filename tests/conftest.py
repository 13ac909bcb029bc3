"""Settings of every test: one thread, no network, nothing written to the user's caches, fixed seeds."""

import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pi_rl.envs.renderer import choose_renderer

# Before any test module imports torch, datasets or matplotlib, which read these once.
_CACHE = Path(tempfile.mkdtemp(prefix="pi_rl_tests_"))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = str(_CACHE / "datasets")
os.environ["HF_LEROBOT_HOME"] = str(_CACHE / "lerobot")
os.environ["TRACKIO_DIR"] = str(_CACHE / "trackio")
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# MuJoCo reads it when it is imported, which any test may be the first to do
os.environ["MUJOCO_GL"] = choose_renderer()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background

SEED = 0


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


def _seed_everything(seed: int) -> None:
    """Seeds Python's generator, and those of numpy and torch if a test module has imported them."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same state of the global generators, whatever ran before; the value is the seed."""
    _seed_everything(SEED)
    return SEED


@pytest.fixture(autouse=True)
def _environment_unchanged() -> Iterator[None]:
    """Undoes what code under test writes to the environment, such as accelerate's launch variables."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def small_policy_folders(tmp_path_factory):
    """Untrained small π0 and π0.5 for MetaWorld at 32 pixels, chunk size 5, K = 4."""
    from pi_rl.envs.metaworld_options import task_instructions
    from pi_rl.policies.small.create import create_small_policy

    root = tmp_path_factory.mktemp("policies")
    texts = [task_instructions()[task] for task in ("handle-press-v3", "button-press-topdown-v3")]
    return {
        kind: create_small_policy(
            kind,
            cameras={"observation.image": (32, 32)},
            state_dim=4,
            action_dim=4,
            image_size=32,
            chunk_size=5,
            n_action_steps=5,
            denoising_steps=4,
            instructions=texts,
            output_dir=root / kind,
            seed=0,
        )
        for kind in ("pi0", "pi05")
    }


@pytest.fixture(scope="session")
def small_pi0_folder(small_policy_folders):
    return small_policy_folders["pi0"]


@pytest.fixture
def small_policy(small_policy_folders):
    """Loads a fresh copy: ``small_policy("pi05")``."""
    import torch

    from pi_rl.policies.checkpoints import load_policy

    torch.set_num_threads(1)
    return lambda kind="pi0": load_policy(small_policy_folders[kind], device="cpu")


@pytest.fixture(scope="session")
def mlp_folder(tmp_path_factory):
    """An untrained flow policy without a VLM for the toy environments: two numbers of action, H = C = 2, K = 4."""
    from pi_rl.envs.registry import check_name_and_options
    from pi_rl.policies.mlp.create import action_bounds, create_mlp_policy

    spec = check_name_and_options("toy:point-mass", {})
    return create_mlp_policy(
        state_dim=spec.state_dim,
        action_dim=spec.action_dim,
        chunk_size=2,
        n_action_steps=2,
        denoising_steps=4,
        hidden=(32, 32),
        dataset_stats=action_bounds(spec.action_low, spec.action_high),
        output_dir=tmp_path_factory.mktemp("mlp") / "policy",
        seed=0,
    )


@pytest.fixture(scope="session")
def two_task_dataset(tmp_path_factory):
    """Three episodes of six frames of each of two tasks, in turn: local/two-tasks."""
    import numpy as np
    from lerobot.datasets import LeRobotDataset

    root = tmp_path_factory.mktemp("sft") / "data"
    features = {
        "observation.image": {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channel"]},
        "observation.state": {"dtype": "float32", "shape": (4,), "names": list("xyzg")},
        "action": {"dtype": "float32", "shape": (4,), "names": list("xyzg")},
    }
    dataset = LeRobotDataset.create("local/two-tasks", fps=80, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for episode in range(6):
        for _ in range(6):
            frame = {key: rng.normal(size=4).astype(np.float32) for key in ("observation.state", "action")}
            frame["observation.image"] = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            dataset.add_frame({**frame, "task": ("Press a handle down", "Push the button")[episode % 2]})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture
def metaworld_env():
    """Makes small, quickly rendered MetaWorld environments and closes them."""
    from pi_rl import make_env

    made = []

    def make(name="metaworld:handle-press-v3", num_envs=4, num_workers=1, **options):
        quick = {"image_size": 32, "fast_rendering": True, "hide_arm": True}
        made.append(make_env(name, num_envs, num_workers, **{**quick, **options}))
        return made[-1]

    yield make
    for env in made:
        env.close()


@pytest.fixture
def hub():
    """An empty Hub on the loopback interface."""
    from tests.hub.hub_server import Server

    with Server() as served:
        yield served


@pytest.fixture
def hub_here(hub, tmp_path, monkeypatch):
    """The same, which the Hub client of this process talks to with a token that may write for "user"."""
    from tests.hub.hub_client import client_here

    with client_here(hub, tmp_path / "hf", monkeypatch):
        yield hub
