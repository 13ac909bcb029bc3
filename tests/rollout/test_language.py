"""Several tasks in one policy: the instruction reaches the model, and each episode is told its own."""

import dataclasses

import numpy as np
import pytest
import torch

from pi_rl.envs.metaworld_options import task_instructions
from pi_rl.rollout.collector import RolloutCollector
from pi_rl.rollout.evaluator import evaluate_policy, evaluation_ids, ode_actions
from pi_rl.rollout.policy_io import PolicyIO
from pi_rl.trainer.build import build_actor_critic
from pi_rl.trainer.flow_ppo_config import FlowPPOConfig

TASKS = ("handle-press-v3", "button-press-topdown-v3")
SENTENCES = [task_instructions()[task] for task in TASKS]


@pytest.fixture(params=["pi0", "pi05"])
def two_tasks(request, small_policy, metaworld_env, tmp_path):
    """Model, environment and processors; `told` collects the texts that the preprocessor is given."""
    env = metaworld_env(f"metaworld:{','.join(TASKS)}", num_envs=4, max_episode_steps=10)
    loaded = small_policy(request.param)
    args = FlowPPOConfig(output_dir=str(tmp_path), use_cpu=True, num_envs=4, rollout_chunks=2, noise="flow_sde",
                         per_device_train_batch_size=8)  # fmt: skip
    model = build_actor_critic(loaded, args, make_critic=lambda policy: None)
    told: list[tuple[torch.Tensor, list[str]]] = []

    def preprocess(raw):
        told.append((raw["observation.state"].clone(), list(raw["task"])))
        return loaded.preprocessor(raw)

    return model, env, PolicyIO(preprocess, loaded.postprocessor, env.spec, model.policy.n_action_steps), told


def test_another_sentence_is_another_action(two_tasks):
    """The same picture, state and noise: only the words differ."""
    model, env, io, _ = two_tasks
    model.eval()
    ids = np.array([[0, 7]] * 4)
    observation = env.reset(ids)
    observation["task"] = [SENTENCES[0], SENTENCES[1], SENTENCES[0], SENTENCES[1]]
    rows = np.arange(4)
    with torch.no_grad():
        actions = ode_actions(model, io, observation, rows, ids, np.zeros(4, np.int64), seed=0)
    np.testing.assert_allclose(actions[0], actions[2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(actions[1], actions[3], rtol=0, atol=1e-6)
    assert np.abs(actions[0] - actions[1]).max() > 1e-3


def test_every_episode_is_told_its_own_tasks_sentence(two_tasks):
    """The hand starts a fifth of a metre further forward at the handle, so the state tells which task it was."""
    model, env, io, told = two_tasks
    results = evaluate_policy(model, env, io, evaluation_ids(env.spec, 12))
    assert len(results.success) == 12
    RolloutCollector(env, model, io, chunks=2, seed=0).collect(0)
    texts = [text for _, listed in told for text in listed]
    assert {text: texts.count(text) for text in SENTENCES} == dict.fromkeys(SENTENCES, len(texts) // 2)
    for state, listed in told:
        for hand, text in zip(state[:, 1].tolist(), listed, strict=True):
            assert (hand > 0.5) == (text == SENTENCES[0])


def test_the_sentence_decides_what_is_evaluated(two_tasks):
    model, env, io, told = two_tasks
    ids = evaluation_ids(env.spec, 4)
    actions = []
    for sentences in (SENTENCES, SENTENCES[::-1]):
        env.spec = dataclasses.replace(env.spec, instructions=tuple(sentences))
        told.clear()
        evaluate_policy(model, env, io, ids)
        actions.append(told[-1][0])  # where the hands went
    assert (actions[0] - actions[1]).abs().max() > 1e-4
