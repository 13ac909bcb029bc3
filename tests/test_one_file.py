"""The one-page script against the trainer, number by number: rollouts, losses, weights, evaluation.

Both round alike, because they call the same functions on the same shapes in the same order, with one exception: the
trainer values the last observations of episodes in a batch of their own, the script in one batch with all others, and
matrix products of different shapes differ in the last bit. Rollouts are therefore compared for equality, and what
follows from those values, returns and weights, to 1e-6; observed are differences of 3e-8.
"""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from pi_rl import FlowPPOConfig, FlowPPOTrainer
from pi_rl.envs import toy
from pi_rl.policies.mlp.create import create_mlp_policy

SCRIPT = Path(__file__).parents[1] / "scripts" / "flow_ppo_one_file.py"
ENVS, CHUNKS, ITERATIONS, MINIBATCH = 6, 8, 4, 16
TOLERANCE = 0.29  # untrained policies reach goals this large, so that episodes end in both ways
# of every parameter name, the trainer's first letters and the script's
PREFIXES = {
    "policy.policy.model.tokens.": "tokens.",
    "policy.policy.model.action_out.": "action_out.0.",
    "value_head.layers.": "value_head.0.",
    "noise_network.layers.": "noise_network.",
}
OPTIONS = {
    "seed": 3,
    "num_envs": ENVS,
    "rollout_chunks": CHUNKS,
    "update_epochs": 3,
    "denoising_steps": 3,
    "clip_range": 0.1,
    "value_clip_range": 0.01,
    "huber_delta": 0.05,
    "learning_rate": 3e-3,
    "critic_learning_rate": 1e-2,
    "weight_decay": 0.01,
    "max_grad_norm": 0.3,
    "eval_episodes": ENVS,
}
NOISES = {
    "flow_sde": {"noise_level": 0.6},
    "flow_noise": {"noise_std_min": 0.1, "noise_std_max": 0.5, "entropy_coefficient": 0.005},
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("flow_ppo_one_file", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(params=NOISES)
def pair(request, script, tmp_path, seed, monkeypatch):
    """The trainer and the script's agent with the same settings and weights."""
    options = {"noise": request.param, **OPTIONS, **NOISES[request.param]}
    monkeypatch.setattr(script, "TOLERANCE", TOLERANCE)
    config = script.Config(iterations=ITERATIONS, minibatch_size=MINIBATCH, eval_every=ITERATIONS, **options)
    agent = script.Agent(config)
    folder = create_mlp_policy(
        state_dim=6,
        action_dim=2,
        chunk_size=config.chunk_size,
        n_action_steps=config.chunk_size,
        denoising_steps=config.denoising_steps,
        output_dir=tmp_path / "policy",
        seed=seed,
    )
    args = FlowPPOConfig(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        disable_tqdm=True,
        eval_on_start=False,
        critic_hidden_sizes=[64, 64],
        num_iterations=ITERATIONS,
        per_device_train_batch_size=MINIBATCH,
        **options,
    )
    trainer = FlowPPOTrainer(folder, args, "toy:point-mass", {"tolerance": TOLERANCE})
    with torch.no_grad():  # a new policy ignores its observation; this one does not
        for parameter in trainer.actor_critic.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    agent.load_state_dict(weights(trainer))
    return trainer, agent


def weights(trainer):
    """Copies of the trainer's weights under the script's names."""
    named = {}
    for name, tensor in trainer.actor_critic.state_dict().items():
        (prefix,) = (prefix for prefix in PREFIXES if name.startswith(prefix))
        named[PREFIXES[prefix] + name.removeprefix(prefix)] = tensor.clone()
    return named


def test_it_is_one_page_and_needs_torch_and_numpy_alone():
    source = SCRIPT.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 300
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "numpy"}


def test_its_environment_is_the_toy_environment(script):
    options = toy.ToyOptions()
    expected = (options.dimensions, options.max_episode_steps, options.tolerance, toy.CLOSEST, toy.FARTHEST)
    assert (script.A, script.TIME_LIMIT, script.TOLERANCE, script.CLOSEST, script.FARTHEST) == expected
    assert (script.FPS, script.FORCE, script.DRAG) == (toy.FPS, toy.FORCE, toy.DRAG)


def test_the_trainer_draws_the_same_rollouts(script, pair):
    trainer, agent = pair
    truncated = terminated = 0
    for iteration in range(5):
        ours, theirs = script.collect(agent, script.PointMass(ENVS), iteration), trainer.collector.collect(iteration)
        assert theirs.valid.all()
        expected = {
            "state": theirs.critic_input,
            "chain": theirs.x,
            "log_prob": theirs.log_prob,
            "value": theirs.values,
            "reward": theirs.rewards,
            "terminated": theirs.terminated,
            "done": theirs.done,
        }
        if theirs.step_index is not None:
            expected["step"] = theirs.step_index
        for name, tensor in expected.items():
            assert torch.equal(ours[name], tensor.reshape(ours[name].shape)), name
        followed = ~theirs.terminated
        torch.testing.assert_close(ours["next_value"][followed], theirs.next_values[followed], rtol=0, atol=1e-6)
        advantages = script.gae(ours, 0.99, 0.95)
        torch.testing.assert_close(advantages, trainer.estimate(theirs).advantages[:, 0], rtol=0, atol=1e-6)
        truncated, terminated = truncated + theirs.truncated.sum(), terminated + theirs.terminated.sum()
    assert min(truncated, terminated) >= 2


def test_the_trainer_makes_the_same_updates(script, pair):
    trainer, agent = pair
    before = weights(trainer)
    history = script.train(agent)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == len(log) == ITERATIONS
    names = {
        "policy_loss": "policy/loss",
        "value_loss": "critic/loss",
        "approx_kl": "policy/approx_kl",
        "clip_fraction": "policy/clip_fraction",
        "success": "rollout/success_rate",
    }
    for ours, theirs in zip(history, log, strict=True):
        assert {name: ours[name] for name in names} == pytest.approx(
            {name: theirs[key] for name, key in names.items()}, rel=0, abs=1e-6
        )
    after = weights(trainer)
    torch.testing.assert_close(dict(agent.state_dict()), after, rtol=0, atol=1e-6)
    for name, tensor in after.items():
        assert (tensor - before[name]).abs().max() > 1e-4, name
    assert history[-1]["deterministic_success"] == trainer.evaluate()["eval_success_rate"]
    # and both clips, the linear part of the Huber loss and the clip of the gradient norm had something to do
    for name, least in (("policy/clip_fraction", 0), ("critic/clip_fraction", 0), ("critic/loss", 0.05**2 / 2)):
        assert max(entry[name] for entry in log) > least, name
    assert max(entry["grad_norm"] for entry in log) > OPTIONS["max_grad_norm"]


@pytest.mark.parametrize("noise", ["flow_sde", pytest.param("flow_noise", marks=pytest.mark.slow)])
def test_it_learns_from_success_alone(script, noise):
    torch.manual_seed(0)
    agent = script.Agent(script.Config(noise=noise))
    assert script.evaluate(agent) < 0.05
    history = script.train(agent)
    assert history[0]["success"] < 0.15
    assert history[-1]["success"] > 0.8
    assert history[-1]["deterministic_success"] > 0.9
