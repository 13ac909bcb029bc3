"""Relative actions are added to the state their chunk began with; prompts have a known greatest length."""

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from pi_rl.envs.vector_env import EnvSpec
from pi_rl.flow.sampler import FlowSampler
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.checkpoints import load_policy, save_policy
from pi_rl.policies.small.create import create_small_policy
from pi_rl.policies.wrap import wrap_policy
from pi_rl.rollout.evaluator import ode_actions
from pi_rl.rollout.policy_io import PolicyIO, longest_prompt_tokens

CAMERA, SIZE, STATE, ACTIONS, HORIZON, EXECUTED = "observation.image", 16, 4, 3, 5, 4
SENTENCES = ("open the drawer", "put the red mug on the plate")
MEAN, STD = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([2.0, 0.5, 1.0])


def spec_of(sentences=SENTENCES, state_dim=STATE):
    bound = (100.0,) * ACTIONS
    return EnvSpec("made", tuple(map(str, range(len(sentences)))), tuple(sentences), {CAMERA: (SIZE, SIZE)}, state_dim,
                   ACTIONS, 20, 10, tuple(-b for b in bound), bound)  # fmt: skip


def write(folder, kind="pi0", **options):
    sizes = {"depth": 1, "vision_depth": 1, "tokenizer_max_length": 64} | options
    stats = {"action": {"mean": MEAN, "std": STD, "q01": MEAN - STD, "q99": MEAN + STD}}
    return create_small_policy(kind, cameras=[CAMERA], state_dim=STATE, action_dim=ACTIONS, image_size=SIZE,
                               chunk_size=HORIZON, n_action_steps=EXECUTED, denoising_steps=2, output_dir=folder,
                               instructions=SENTENCES, seed=0, dataset_stats=stats, **sizes)  # fmt: skip


@pytest.fixture(scope="module")
def relative(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relative") / "p"
    excluded = {"relative_exclude_joints": ["gripper"], "action_feature_names": ["x", "y", "gripper"]}
    return load_policy(write(folder, use_relative_actions=True, **excluded))


def io_of(loaded, spec=None):
    return PolicyIO(loaded.preprocessor, loaded.postprocessor, spec or spec_of(), EXECUTED)


def observation(seed, rows=6):
    rng = np.random.default_rng(seed)
    return {
        CAMERA: rng.integers(0, 256, (rows, SIZE, SIZE, 3), dtype=np.uint8),
        "observation.state": rng.normal(size=(rows, STATE)).astype(np.float32),
        "task": [SENTENCES[i % 2] for i in range(rows)],
    }


def test_a_chunk_is_relative_to_its_own_first_state(relative):
    io, now, later = io_of(relative), observation(0), observation(1)
    rows = np.array([4, 1, 3])
    io.batch(now, rows)
    io.batch(later, np.array([0, 2]))  # a bootstrap value, or the other half of the environments
    chunk = torch.randn(3, HORIZON, ACTIONS, generator=torch.Generator().manual_seed(0))
    by_hand = (chunk[:, :EXECUTED] * STD + MEAN).numpy()
    by_hand[:, :, :2] += now["observation.state"][rows, None, :2]  # every step, the gripper stays absolute
    np.testing.assert_allclose(io.actions(chunk, now, rows), by_hand, rtol=0, atol=1e-6)


def test_slices_filled_up_by_repetition_keep_their_states(relative):
    model = FlowActorCritic(wrap_policy(relative.policy), None, None, FlowSampler("flow_sde", "hybrid", 2, 0.5))
    model.eval()
    io, now, rows = io_of(relative), observation(0), np.array([5, 0, 2, 3, 4])
    ids, chunk = np.stack([np.zeros(5, np.int64), np.arange(5)], 1), np.zeros(5, np.int64)
    with torch.no_grad():
        whole = ode_actions(model, io, now, rows, ids, chunk, seed=0)
        sliced = ode_actions(model, io, now, rows, ids, chunk, seed=0, batch_size=2)
    np.testing.assert_allclose(sliced, whole, rtol=0, atol=1e-5)


def test_relative_actions_need_a_state_of_their_size(relative):
    with pytest.raises(ValueError, match="state_dim=2, fewer than its action_dim=3"):
        io_of(relative, spec_of(state_dim=2))


@pytest.mark.parametrize("with_state", [True, False])
def test_pi05_keeps_its_kind_of_prompt(tmp_path, with_state):
    first = load_policy(write(tmp_path / "a", "pi05", state_in_prompt=with_state))
    again = load_policy(save_policy(tmp_path / "b", first.policy, first.preprocessor, first.postprocessor))
    shutil.rmtree(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    batches = [io_of(loaded).batch(observation(0), np.arange(2)) for loaded in (first, again)]
    tokens, mask = (batches[1][f"observation.language.{name}"] for name in ("tokens", "attention_mask"))
    text = tokenizer.decode(tokens[0][mask[0].bool()], skip_special_tokens=True)
    assert text.startswith("Task: open the drawer, State: ") if with_state else text == "open the drawer\n"
    noise = torch.zeros(2, HORIZON, first.policy.config.max_action_dim)
    assert torch.equal(tokens, batches[0]["observation.language.tokens"])
    assert torch.equal(*(loaded.policy.predict_action_chunk(batch, noise=noise)
                         for loaded, batch in zip((first, again), batches, strict=True)))  # fmt: skip
    assert again.policy.config.state_in_prompt is with_state


def test_pi0_has_no_state_in_its_prompt(tmp_path):
    with pytest.raises(ValueError, match="state_in_prompt is for π0.5"):
        write(tmp_path / "p", "pi0", state_in_prompt=False)


@pytest.mark.parametrize(("kind", "options"), [("pi0", {}), ("pi05", {}), ("pi05", {"state_in_prompt": False})])
def test_no_prompt_is_longer_than_the_longest(tmp_path, kind, options):
    loaded = load_policy(write(tmp_path / "p", kind, **options))
    io, longest = io_of(loaded), longest_prompt_tokens(loaded.preprocessor, spec_of())
    seen = []
    for scale in (0.3, 1.0, 5.0):
        now = observation(3, rows=64)
        now["observation.state"] *= scale
        seen.append(int(io.batch(now, np.arange(64))["observation.language.attention_mask"].sum(1).max()))
    assert max(seen) <= longest
    if kind == "pi0" or options:
        assert max(seen) == longest
    tokenizer = next(step for step in loaded.preprocessor.steps if hasattr(step, "input_tokenizer"))
    tokenizer.max_length = 5
    assert longest_prompt_tokens(loaded.preprocessor, spec_of()) == 5
