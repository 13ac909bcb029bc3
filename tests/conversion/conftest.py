"""Small policies with statistics, whose VLM and expert differ in width, and the same in openpi's layout."""

import json
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from pi_rl.policies.checkpoints import load_policy
from pi_rl.policies.small.create import create_small_policy
from pi_rl.policies.weight_files import EMBEDDING, EXPERT_HEAD, INDEX_FILE, VLM_HEAD, WEIGHTS_FILE

KINDS = ("pi0", "pi05")
CAMERAS = ("observation.image", "observation.images.wrist")
STATE_DIM, ACTION_DIM, HORIZON, PADDED, STEPS = 4, 3, 6, 5, 3
VLM_WIDTH, EXPERT_WIDTH = 48, 32


def statistics(seed=0):
    """openpi's numbers: padded, double precision."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in ("state", "actions"):
        mean, spread = torch.randn(2, 8, generator=generator, dtype=torch.float64)
        low = mean - spread.abs() - 0.1
        found[name] = {
            "mean": mean.tolist(),
            "std": (spread.abs() + 0.01).tolist(),
            "q01": low.tolist(),
            "q99": (low + 1 + spread.abs()).tolist(),
        }
    return found


def lerobot_statistics(stats):
    sizes = {"observation.state": ("state", STATE_DIM), "action": ("actions", ACTION_DIM)}
    return {
        feature: {key: torch.tensor(values[:size]) for key, values in stats[name].items()}
        for feature, (name, size) in sizes.items()
    }


def write_policy(kind, folder, **options):
    defaults = {
        "cameras": CAMERAS,
        "state_dim": STATE_DIM,
        "action_dim": ACTION_DIM,
        "image_size": 32,
        "chunk_size": HORIZON,
        "n_action_steps": HORIZON,
        "denoising_steps": STEPS,
        "instructions": ("open the drawer", "press the handle down"),
        "seed": 0,
        "max_action_dim": PADDED,
        "vlm_width": VLM_WIDTH,
        "expert_width": EXPERT_WIDTH,
        "dataset_stats": lerobot_statistics(statistics()),
    }
    return create_small_policy(kind, output_dir=folder, **{**defaults, **options})


@pytest.fixture(scope="session")
def policy_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("lerobot")
    return {kind: write_policy(kind, root / kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def folder(request, policy_folders):
    return policy_folders[request.param]


def openpi_tensors(folder, prefix=""):
    """The weights as openpi's model has them: no "model.", embedding and head as one."""
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors[VLM_HEAD] = tensors.pop(EMBEDDING)
    del tensors[EXPERT_HEAD]
    return {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def write_openpi(folder, tensors, shards=1, stats=None):
    folder.mkdir(parents=True)
    names = sorted(tensors)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else [WEIGHTS_FILE]
    place = {name: files[i % shards] for i, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if place[name] == file}, folder / file)
    if shards > 1:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    if stats is not None:
        write_stats(folder / "assets" / "physical-intelligence" / "libero" / "norm_stats.json", stats)
    return folder


def write_stats(path, stats):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"norm_stats": stats}))
    return path


def observations(samples=3):
    generator = torch.Generator().manual_seed(1)
    raw = {camera: torch.rand(samples, 3, 40, 32, generator=generator) for camera in CAMERAS}
    raw["observation.state"] = torch.rand(samples, STATE_DIM, generator=generator) * 2 - 1
    raw["task"] = ["open the drawer"] * samples
    return raw


def noise(samples=3):
    return torch.randn(samples, HORIZON, PADDED, generator=torch.Generator().manual_seed(2))


def actions(policy, preprocessor, postprocessor):
    """Actions in the environment's units, from fixed noise."""
    batch = preprocessor(observations())
    return postprocessor(policy.predict_action_chunk(batch, noise=noise())[..., :ACTION_DIM])


def actions_of(folder, processors=None):
    """Actions of a folder's policy; with the processors of another folder, if one is given."""
    loaded = load_policy(folder)
    around = loaded if processors is None else load_policy(processors)
    return actions(loaded.policy, around.preprocessor, around.postprocessor)


@pytest.fixture
def tools():
    """Helpers for the tests of this folder (test modules cannot import each other)."""
    torch.set_num_threads(1)
    return types.SimpleNamespace(
        write_policy=write_policy,
        statistics=statistics,
        lerobot_statistics=lerobot_statistics,
        openpi_tensors=openpi_tensors,
        write_openpi=write_openpi,
        write_stats=write_stats,
        observations=observations,
        actions=actions,
        actions_of=actions_of,
        state_dim=STATE_DIM,
        action_dim=ACTION_DIM,
        horizon=HORIZON,
        padded=PADDED,
        vlm_width=VLM_WIDTH,
        expert_width=EXPERT_WIDTH,
    )
