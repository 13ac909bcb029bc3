"""Small policies of both kinds, written once per session, and observations for them."""

import copy
import types

import pytest
import torch

from pi_rl.flow.noise_network import NoiseNetwork
from pi_rl.flow.sampler import FlowSampler
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.checkpoints import load_policy
from pi_rl.policies.critic import ValueHead
from pi_rl.policies.pi import PiFlowPolicy
from pi_rl.policies.small.create import create_small_policy

KINDS = ("pi0", "pi05")
CAMERAS = ("observation.image", "observation.images.wrist")
INSTRUCTIONS = ("press the handle down", "open the drawer")
STATE_DIM, ACTION_DIM, HORIZON, EXECUTED, STEPS = 4, 3, 6, 4, 3
PADDED_ACTION_DIM = 5

SAMPLERS = {
    "flow_sde": FlowSampler("flow_sde", "hybrid", STEPS, 0.5),
    "flow_noise": FlowSampler("flow_noise", "one_layer", STEPS, None),
    "flow_cps": FlowSampler("flow_cps", "hybrid", STEPS, 0.5),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def write_policy(kind, folder, **options):
    defaults = {
        "cameras": CAMERAS,
        "state_dim": STATE_DIM,
        "action_dim": ACTION_DIM,
        "image_size": 32,
        "chunk_size": HORIZON,
        "n_action_steps": EXECUTED,
        "denoising_steps": STEPS,
        "instructions": INSTRUCTIONS,
        "seed": 0,
        "max_action_dim": PADDED_ACTION_DIM,
    }
    return create_small_policy(kind, output_dir=folder, **{**defaults, **options})


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    return {kind: write_policy(kind, root / kind) for kind in KINDS}


def observations(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    raw = {camera: torch.rand(samples, 3, 40, 32, generator=generator) for camera in CAMERAS}
    raw["observation.state"] = torch.rand(samples, STATE_DIM, generator=generator) * 2 - 1
    raw["task"] = [INSTRUCTIONS[i % 2] for i in range(samples)]
    return raw


@pytest.fixture(scope="session")
def originals(folders):
    return {kind: load_policy(folder) for kind, folder in folders.items()}


@pytest.fixture(params=KINDS)
def loaded(request, originals):
    return copy.deepcopy(originals[request.param])


@pytest.fixture
def policy(loaded):
    policy = PiFlowPolicy(loaded.policy)
    policy.freeze_vlm()
    return policy


@pytest.fixture
def batch(loaded):
    return loaded.preprocessor(observations(4))


def make_actor_critic(policy, noise="flow_sde", seed=0):
    torch.manual_seed(seed)
    network = NoiseNetwork(policy.feature_dim, policy.max_action_dim, 0.1, 0.4) if noise == "flow_noise" else None
    return FlowActorCritic(policy, ValueHead(policy, (16,)), network, SAMPLERS[noise])


def noise(actor_critic, samples, seed=0):
    """Random numbers of one chunk, as keyword arguments of the modes that act."""
    generator = torch.Generator().manual_seed(seed)
    policy, sampler = actor_critic.policy, actor_critic.sampler
    shape = (policy.chunk_size, policy.max_action_dim)
    return {
        "x_init": torch.randn(samples, *shape, generator=generator),
        "eps": torch.randn(samples, sampler.denoising_steps, *shape, generator=generator),
        "step_index": sampler.draw_step_index(torch.rand(samples, generator=generator)),
    }


def draw(actor_critic, prefix, seed=0):
    """A sampled chain and its log-prob (B, U)."""
    sample = actor_critic("sample", prefix=prefix, **noise(actor_critic, len(prefix), seed))
    return sample.chain, sample.log_prob[:, 0]


@pytest.fixture
def toolbox():
    """Helpers for the tests of this folder (test modules cannot import each other)."""
    return types.SimpleNamespace(
        write_policy=write_policy,
        observations=observations,
        make_actor_critic=make_actor_critic,
        draw=draw,
        noise=noise,
        state_dim=STATE_DIM,
        action_dim=ACTION_DIM,
        horizon=HORIZON,
        executed=EXECUTED,
        steps=STEPS,
        cameras=CAMERAS,
        instructions=INSTRUCTIONS,
    )
