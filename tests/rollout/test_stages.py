"""Two stages do to the bit what one does, and processes without rows make the same calls as those with some."""

import threading

import numpy as np
import pytest
import torch

from pi_rl import FlowGRPOConfig, FlowGRPOTrainer, FlowPPOConfig, FlowPPOTrainer
from pi_rl.envs.toy import PointMassEnv, ToyOptions, make_spec
from pi_rl.policies.critic import ValueHead
from pi_rl.rollout.collector import RolloutCollector
from pi_rl.rollout.evaluator import evaluate_policy
from pi_rl.rollout.policy_io import PolicyIO
from pi_rl.rollout.stages import check_stages
from pi_rl.trainer.build import build_actor_critic

OPTIONS = ToyOptions(tolerance=0.29, reward="distance", max_episode_steps=12)
NUM_ENVS, CHUNKS = 8, 7
ONE, TWO = {"inference_batch_size": NUM_ENVS // 2}, {"pipeline_stages": 2}
KINDS = {
    "ppo": (FlowPPOTrainer, FlowPPOConfig, {"noise": "flow_sde"}),
    "ppo, step drawn per batch, V_expert": (
        FlowPPOTrainer,
        FlowPPOConfig,
        {"noise": "flow_sde", "step_draw": "batch", "critic": "expert", "rollout_epochs": 2},
    ),
    "ppo, one episode": (FlowPPOTrainer, FlowPPOConfig, {"auto_reset": False, "noise": "flow_noise"}),
    "grpo": (FlowGRPOTrainer, FlowGRPOConfig, {"group_size": 2, "filter_groups": False}),
}


class Toy(PointMassEnv):
    """Breaks once in three of the environments if `fragile`, and remembers how many chunks were under way at once."""

    def __init__(self, fragile=False):
        super().__init__(make_spec("toy:point-mass", ("point-mass",), OPTIONS), OPTIONS, NUM_ENVS)
        self.most = 0
        self.breaks = np.isin(np.arange(NUM_ENVS), (1, 2, 6)) & fragile

    def start_chunk(self, actions, active=None):
        super().start_chunk(actions, active)
        self.most = max(self.most, self.pending_chunks)

    def _advance(self, slots, actions):
        result = super()._advance(slots, actions)
        broken = slots[self.breaks[slots] & (self._steps[slots] == 4)]
        self.states[broken, 0], self.breaks[broken] = np.nan, False
        return result


@pytest.fixture
def make(mlp_folder, tmp_path):
    def make(kind, env=None, **options):
        trainer, config, fixed = KINDS[kind]
        args = config(
            output_dir=str(tmp_path / str(len(list(tmp_path.iterdir())))), num_envs=NUM_ENVS, rollout_chunks=CHUNKS,
            num_iterations=2, per_device_train_batch_size=28, update_epochs=2, use_cpu=True, eval_episodes=0,
            save_strategy="no", disable_tqdm=True, learning_rate=1e-3, **fixed, **options,
        )  # fmt: skip
        return trainer(str(mlp_folder), args, Toy() if env is None else env)

    return make


def assert_equal_rollouts(first, second):
    for name in ("rewards", "terminated", "truncated", "valid", "groups", "values", "next_values", "x", "step_index",
                 "log_prob", "critic_input"):  # fmt: skip
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name
    rows = torch.arange(len(first.inputs))
    assert len(first.inputs) == len(second.inputs) == len(first.x)
    inputs = dict(first.inputs[rows].tensors()), dict(second.inputs[rows].tensors())
    assert all(torch.equal(inputs[0][name], inputs[1][name]) for name in inputs[0] | inputs[1])
    assert torch.equal(first.statistics.as_tensor(), second.statistics.as_tensor())


@pytest.mark.parametrize("fragile", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_stages_learn_to_the_bit_what_one_learns(make, kind, fragile):
    trainers = [make(kind, Toy(fragile), **options) for options in (ONE, TWO)]
    rollouts = [trainer.collector.collect(0) for trainer in trainers]
    assert_equal_rollouts(*rollouts)
    assert rollouts[0].done.any()
    assert (rollouts[0].statistics.failed > 0) == fragile
    assert [trainer.env.most for trainer in trainers] == [1, 2]
    before = {name: value.clone() for name, value in trainers[0].actor_critic.state_dict().items()}
    for trainer in trainers:
        trainer.env.breaks[[1, 2, 6]] = fragile
        trainer.train()
    one, two = (trainer.actor_critic.state_dict() for trainer in trainers)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], before[name]) for name in one)


@pytest.mark.parametrize("critic", ["vlm", pytest.param("expert", marks=pytest.mark.slow)])
def test_two_stages_are_one_in_metaworld(small_policy, metaworld_env, tmp_path, critic):
    loaded = small_policy()
    torch.manual_seed(0)
    args = FlowPPOConfig(output_dir=str(tmp_path), num_envs=4, rollout_chunks=5, per_device_train_batch_size=20,
                         noise_std_min=0.4, noise_std_max=1.0, use_cpu=True)  # fmt: skip
    model = build_actor_critic(loaded, args, make_critic=lambda policy: ValueHead(policy, [16], critic=critic))
    rollouts = []
    for stages, workers, per_pass in ((1, 1, 2), (2, 2, None), (2, 1, None)):
        env = metaworld_env(max_episode_steps=12, num_workers=workers)
        io = PolicyIO(loaded.preprocessor, loaded.postprocessor, env.spec, model.policy.n_action_steps)
        options = {"pipeline_stages": stages, "inference_batch_size": per_pass}
        rollouts.append(RolloutCollector(env, model, io, chunks=5, seed=1, **options).collect(0))
        assert env.pending_chunks == 0
    assert rollouts[0].truncated.any()
    assert_equal_rollouts(rollouts[0], rollouts[1])
    assert_equal_rollouts(rollouts[0], rollouts[2])


class Lockstep:
    """An all-reduce(max) between the threads that stand for processes; a barrier that breaks fails the test."""

    def __init__(self, processes):
        self.barrier = threading.Barrier(processes, timeout=10)
        self.said = [False] * processes

    def of(self, rank):
        def agree(yes):
            self.said[rank] = yes
            self.barrier.wait()
            agreed = any(self.said)
            self.barrier.wait()
            return agreed

        return agree


def in_lockstep(*works):
    """Runs `work(agree)` in a thread each; returns their results."""
    lockstep, results = Lockstep(len(works)), [None] * len(works)

    def run(rank):
        results[rank] = works[rank](lockstep.of(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def watch(model, monkeypatch):
    """The modes that the model is called with, from now on."""
    modes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda mode, **inputs: (modes.append(mode), forward(mode, **inputs))[1])
    return modes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grpo"])
def test_processes_with_different_episodes_make_the_same_calls(make, monkeypatch, kind):
    trainers = [make(kind, Toy(fragile=rank == 1), **TWO, inference_batch_size=2) for rank in range(2)]
    for rank, trainer in enumerate(trainers):
        trainer.collector._group = trainer.collector._group + rank * NUM_ENVS  # other initial states
    alone = [trainer.collector.collect(0) for trainer in trainers]
    alone_inputs = [rollout.inputs[torch.arange(len(rollout.x))] for rollout in alone]
    called = [watch(trainer.actor_critic, monkeypatch) for trainer in trainers]
    trainers[1].env.breaks[[1, 2, 6]] = True

    def work(trainer):
        def collect(agree):
            trainer.collector._agree = agree
            return trainer.collector.collect(0)

        return collect

    together = in_lockstep(*map(work, trainers))
    assert called[0] == called[1] != []
    for one, other, inputs in zip(alone, together, alone_inputs, strict=True):
        assert torch.equal(inputs.pad_mask, other.inputs[torch.arange(len(other.x))].pad_mask)
        for name in ("rewards", "valid", "x", "log_prob", "values", "next_values"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert torch.equal(one.statistics.as_tensor(), other.statistics.as_tensor())
    assert not torch.equal(alone[0].x[0], alone[1].x[0])


def test_a_forced_call_changes_nothing(make, monkeypatch):
    trainer = make("ppo, one episode")
    expected = trainer.collector.collect(0)
    modes, asked = watch(trainer.actor_critic, monkeypatch), []
    trainer.collector._agree = lambda yes: asked.append(yes) or True
    forced = trainer.collector.collect(0)
    assert not all(asked)
    for name in ("rewards", "valid", "x", "log_prob", "values", "next_values"):
        assert torch.equal(getattr(forced, name), getattr(expected, name)), name
    # every chunk acts and values its outcome, and the end is valued once more
    assert modes == ["encode", "sample", *["encode", "value", "encode", "sample"] * (CHUNKS - 1),
                     *["encode", "value"] * 2]  # fmt: skip
    assert len(asked) == 2 * CHUNKS + 1


@pytest.mark.parametrize("batch_size", [None, 3])
def test_evaluations_of_different_lengths_make_the_same_calls(make, monkeypatch, batch_size):
    trainers = [make("ppo", env=Toy()) for _ in range(3)]
    ids = [np.stack([np.zeros(n, np.int64), np.arange(n)], 1) for n in (11, 2, 0)]

    def work(trainer, mine):
        model, env, io = trainer.actor_critic, trainer.env, trainer.io
        return lambda agree: evaluate_policy(model, env, io, mine, batch_size=batch_size, agree=agree)

    works = [work(*pair) for pair in zip(trainers, ids, strict=True)]
    alone = [each(bool) for each in works]
    called = [watch(trainer.actor_critic, monkeypatch) for trainer in trainers]
    together = in_lockstep(*works)
    assert called[0] == called[1] == called[2] != []
    for one, other in zip(alone, together, strict=True):
        for name in ("success", "length", "returns", "failed"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert alone[0].length.all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 1, 3, None), "pipeline_stages=3 .*must be 1 or 2"),
        ((7, 1, 2, None), "7 environments per process do not divide into 2 equal stages; use 6 or 8"),
        ((12, 4, 2, None), "12 environments per process with groups of 4 .*use 8 or 16"),
        ((8, 1, 2, 5), "inference_batch_size=5 must be from 1 to 4"),
        ((8, 1, 1, 0), "inference_batch_size=0 must be from 1 to 8"),
    ],
)
def test_stages_that_cannot_be_are_refused_with_values_that_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_stages(*arguments)


def test_options_are_checked_before_a_run(tmp_path):
    shared = {"output_dir": str(tmp_path), "use_cpu": True, "rollout_chunks": 8, "per_device_train_batch_size": 8}
    with pytest.raises(ValueError, match="equal stages; use 8 or 16 per process"):
        FlowGRPOConfig(num_envs=12, group_size=4, pipeline_stages=2, **shared)
    with pytest.raises(ValueError, match="inference_batch_size=5"):
        FlowPPOConfig(num_envs=8, pipeline_stages=2, inference_batch_size=5, **shared)
    FlowPPOConfig(num_envs=8, pipeline_stages=2, inference_batch_size=3, **shared)
