"""Environments that raise, return NaN or end unsolved; several cameras; idle simulators: real worker processes."""

from pathlib import Path

import numpy as np
import pytest

from pi_rl.envs.vector_env import EnvSpec
from pi_rl.envs.workers import WorkerVectorEnv

CAMERAS = {"observation.images.front": (4, 6), "observation.images.wrist": (3, 3)}
SPEC = EnvSpec(
    "counter:a,b,c", ("a", "b", "c"), ("do a", "do b", "do c"), CAMERAS, 2, 3, 20, 10, (-9.0,) * 3, (9.0,) * 3
)
EXPLODE, NAN_STATE, INF_REWARD = 7, 8, 9
RAISING, UNSTARTED = 5, 99  # state ids


@pytest.fixture
def counters(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    opened = []

    def make(num_envs, num_workers=1, timeout=60, **options):
        backend = "broken_simulator:CounterBackend"
        opened.append(WorkerVectorEnv(SPEC, backend, options, num_envs, num_workers, worker_timeout_s=timeout))
        return opened[-1]

    yield make
    for env in opened:
        env.close()


def ids(*states, task=0):
    return np.array([[task, state] for state in states])


def chunk(*rows):
    """(B, 2, 3) actions from B rows of two (add, how) pairs."""
    return np.array([[[add, how, 0] for add, how in row] for row in rows], np.float32)


def test_every_camera_has_its_own_images(counters):
    env = counters(2)
    observation = env.reset(ids(0, 1))
    assert {camera: observation[camera].shape for camera in CAMERAS} == {
        camera: (2, *size, 3) for camera, size in CAMERAS.items()
    }
    seen = env.step_chunk(chunk([(0.5, 0)] * 2, [(0.25, 0)] * 2)).observation
    assert [np.unique(seen[camera]).tolist() for camera in CAMERAS] == [[20], [21]]


@pytest.mark.parametrize("how", [EXPLODE, NAN_STATE, INF_REWARD])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_broken_simulator_fails_alone(counters, caplog, how, num_workers):
    env = counters(3, num_workers)
    env.reset(ids(0, 1, 2))
    result = env.step_chunk(chunk([(0.5, 0), (0.5, 0)], [(0.5, 0), (0.5, how)], [(2, 0), (2, 0)]))
    assert result.failed.tolist() == [False, True, False]
    assert result.done.tolist() == [False, True, True]
    assert result.success.tolist() == [False, False, True]
    assert not (result.terminated | result.truncated)[1]
    assert result.rewards.tolist() == [[0.5, 0.5], [0, 0], [2, 2]]
    assert np.isfinite(result.observation["observation.state"]).all()
    assert "environment 1 (a, state 1) broke down" in caplog.text
    with pytest.raises(ValueError, match=r"\[1\] have no running episode"):
        env.step_chunk(chunk(*[[(0, 0)] * 2] * 3), [True, True, False])


def test_after_a_failure_the_environment_has_a_new_simulator(counters):
    env = counters(2)
    before = env.reset(ids(0, 1))["observation.state"][:, 1].tolist()
    env.step_chunk(chunk([(0, EXPLODE)] * 2, [(0.5, 0)] * 2))
    after = env.reset(ids(5), [0])["observation.state"]
    assert before == [1, 2]
    assert after[:, 1].tolist() == [3, 2]
    result = env.step_chunk(chunk([(1, 0)] * 2, [(0.5, 0)] * 2))
    assert not result.failed.any()
    np.testing.assert_allclose(result.observation["observation.state"][:, 0], [2.5, 2.1], rtol=1e-6)


def test_an_environment_that_keeps_failing_stops_the_run_with_its_reason(counters):
    env = counters(2)
    for attempt in range(3):
        env.reset(ids(attempt), [0])
        if attempt < 2:
            env.step_chunk(chunk([(0, EXPLODE)] * 2, [(0, 0)] * 2), [True, False])
    with pytest.raises(
        RuntimeError, match=r"environment 0 \(a, state 2\) broke down in 3 episodes .*physics exploded"
    ):
        env.step_chunk(chunk([(0, EXPLODE)] * 2, [(0, 0)] * 2), [True, False])


def test_an_episode_that_ends_between_failures_resets_the_count(counters):
    env = counters(1)
    for how in (EXPLODE, EXPLODE, 0, EXPLODE, EXPLODE):
        env.reset(ids(0))
        result = env.step_chunk(chunk([(3, how)] * 2))
        assert result.failed[0] == (how == EXPLODE)


def test_a_reset_that_fails_is_tried_with_a_new_simulator(counters):
    env = counters(1)
    env.reset(ids(0))
    assert env.reset(ids(13))["observation.state"][0].tolist() == pytest.approx([1.3, 2])


def test_an_episode_may_end_without_success(counters):
    env = counters(1)
    env.reset(ids(0))
    result = env.step_chunk(chunk([(-4, 0), (9, 0)]))
    assert (result.terminated[0], result.success[0], result.truncated[0], result.steps[0]) == (True, False, False, 1)


def test_idle_simulators_are_kept_up_to_the_backends_limit(counters):
    env = counters(1)
    used = [env.reset(ids(0, task=task))["observation.state"][0, 1] for task in (0, 1, 0, 2, 0, 1)]
    # a and b take turns; c makes room by closing b, the one that has waited longest
    assert used == [1, 2, 1, 3, 1, 4]
    assert env.worker_reports()[0]["simulators"] == 4


def test_experts_keep_one_simulator_and_leave_the_last_ones_idle(counters):
    env = counters(1)
    for task in (0, 0, 1, 2, 1):
        list(env.rollout_experts([{"task": task, "state_id": 0, "frames": False}]))
    # a once; b; c, which closes a; b again, which was idle
    assert env.worker_reports()[0]["simulators"] == 3
    env.reset(ids(0, task=2))
    assert env.worker_reports()[0]["simulators"] == 3


def test_trailing_steps_are_recorded_after_success(counters):
    env = counters(1)
    (plain,) = env.rollout_experts([{"task": 0, "state_id": 0}])
    (trailed,) = env.rollout_experts([{"task": 0, "state_id": 0, "trailing_steps": 4}])
    assert plain["success"]
    assert trailed["success"]
    assert (len(plain["actions"]), len(trailed["actions"])) == (3, 7)
    np.testing.assert_array_equal(trailed["actions"][3:, 0], 0)
    assert {camera: len(images) for camera, images in trailed["images"].items()} == dict.fromkeys(CAMERAS, 7)


def test_a_backend_that_misses_files_says_so_plainly(counters):
    env = counters(2, 2, missing="meshes/bowl.obj")
    with pytest.raises(FileNotFoundError, match=r"^meshes/bowl.obj is missing; run this command$"):
        env.reset(ids(0, 0))
    with pytest.raises(RuntimeError, match="was closed"):
        env.reset(ids(0, 0))


def test_an_episode_that_cannot_start_fails_alone(counters, caplog):
    env = counters(3, 2)
    active = np.ones(3, bool)
    env.reset(ids(0, 99, 2))
    result = env.step_chunk(chunk(*[[(0.5, 0)] * 2] * 3), active)
    assert active.all()
    assert result.failed.tolist() == [False, True, False]
    assert result.steps.tolist() == [2, 0, 2]
    assert "environment 1 (a, state 99) broke down: it cannot start: RuntimeError: this simulator" in caplog.text
    env.reset(ids(1), [1])
    assert not env.step_chunk(chunk(*[[(0.5, 0)] * 2] * 3)).failed.any()


def test_there_is_nothing_to_draw_of_a_broken_environment(counters):
    env = counters(2)
    env.reset(ids(0, 0))
    env.step_chunk(chunk([(0, EXPLODE)] * 2, [(0, 0)] * 2))
    with pytest.raises(ValueError, match=r"environments \[0\] have no episode"):
        env.render([0], 8, 8)
    assert env.render([1], 8, 8).shape == (1, 8, 8, 3)


def test_an_expert_that_raises_has_failed_and_the_others_go_on(counters):
    env = counters(1)
    attempts = [{"task": "a", "state_id": state} for state in (RAISING, 0, UNSTARTED)]
    lost, found, unstarted = env.rollout_experts(attempts)
    assert (lost["success"], found["success"], unstarted["success"]) == (False, True, False)
    assert lost["actions"].shape == (1, 3)
    assert unstarted["states"].shape == (0, 2)
