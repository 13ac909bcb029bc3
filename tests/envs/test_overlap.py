"""Chunks that are started and finished apart: real worker processes, and simulations in the calling process."""

import numpy as np
import pytest

from pi_rl.envs.registry import make_env

from .test_failures import EXPLODE, RAISING, UNSTARTED, chunk, counters, ids  # noqa: F401

WAIT = 6
STATE, TASK = "observation.state", "task"
FIRST, SECOND = np.array([True, True, False, False]), np.array([False, False, True, True])
OUTCOME = ("rewards", "terminated", "truncated", "success", "steps", "failed")
STEPS = chunk([(0.5, 0), (0.25, 0)], [(2.5, 0), (1, 0)], [(0.5, 0), (0, EXPLODE)], [(-4, 0), (1, 0)])


def assert_rows(part, whole, rows):
    """Outcomes of these rows are equal, those of the others are nothing."""
    for name in OUTCOME:
        one, other = getattr(part, name), getattr(whole, name)
        np.testing.assert_array_equal(one[rows], other[rows], err_msg=name)
        assert not one[~rows].any(), name
    for key, seen in part.observation.items():
        np.testing.assert_array_equal(np.array(seen)[rows], np.array(whole.observation[key])[rows], err_msg=key)


@pytest.mark.parametrize(("num_workers", "arranged"), [(1, False), (2, True), (3, True), (4, False)])
def test_two_chunks_under_way_are_one_chunk(counters, num_workers, arranged):  # noqa: F811
    whole, parts = counters(4, num_workers), counters(4, num_workers)
    if arranged:
        parts.arrange([[0, 1], [2, 3]])
    whole.reset(ids(0, 1, 2, 3))
    parts.reset(ids(0, 1, 2, 3))
    expected = whole.step_chunk(STEPS)
    garbage = np.where(SECOND[:, None, None], STEPS, np.float32(np.nan))
    parts.start_chunk(STEPS, FIRST)
    parts.start_chunk(garbage, SECOND)  # does not touch the actions of those under way
    assert parts.pending_chunks == 2
    results = parts.finish_chunk(), parts.finish_chunk()
    assert expected.failed.any()
    assert expected.success.any()
    simulators = {key for key in (STATE,) if num_workers > 1}  # a state counts simulators, which another order changes
    for result, rows in zip(results, (FIRST, SECOND), strict=True):
        for key in simulators:
            result.observation[key][:, 1] = expected.observation[key][:, 1]
        assert_rows(result, expected, rows)
    with pytest.raises(RuntimeError, match="no chunk was started"):
        parts.finish_chunk()


def test_a_group_with_workers_of_its_own_does_not_wait_for_another(counters, monkeypatch, tmp_path):  # noqa: F811
    gate = tmp_path / "gate"
    monkeypatch.setenv("COUNTER_GATE", str(gate))
    env = counters(4, 2)
    env.arrange([[0, 1], [2, 3]])
    env.reset(ids(0, 1, 2, 3))
    held = chunk(*[[(0.5, WAIT), (0.5, 0)]] * 2, *[[(0.5, 0)] * 2] * 2)
    env.start_chunk(held, FIRST)  # cannot end yet
    assert env.reset(ids(7, 8), [2, 3])[STATE][2:, 0].tolist() == pytest.approx([0.7, 0.8])
    assert env.render([3], 2, 2).shape == (1, 2, 2, 3)
    env.start_chunk(held, SECOND)
    gate.touch()
    assert env.finish_chunk().rewards.sum(1).tolist() == [1, 1, 0, 0]
    assert env.finish_chunk().rewards.sum(1).tolist() == [0, 0, 1, 1]


def test_what_is_under_way_must_not_be_touched(counters):  # noqa: F811
    env = counters(4, 2)
    env.reset(ids(0, 1, 2, 3))
    env.start_chunk(STEPS, FIRST)
    busy = r"environments \[1\] are in a chunk that was started and not finished"
    with pytest.raises(ValueError, match=busy):
        env.start_chunk(STEPS, [False, True, True, False])
    with pytest.raises(ValueError, match=busy):
        env.reset(ids(3), [1])
    with pytest.raises(ValueError, match=busy):
        env.render([1], 2, 2)
    with pytest.raises(RuntimeError, match="1 started chunk.* wait to be finished"):
        env.step_chunk(STEPS, SECOND)
    with pytest.raises(RuntimeError, match="cannot be arranged while"):
        env.arrange([[0, 1], [2, 3]])
    with pytest.raises(RuntimeError, match="finish the chunks"):
        next(env.rollout_experts([{"task": 0, "state_id": 0}]))
    env.finish_chunk()
    with pytest.raises(ValueError, match=r"each of the 4 environments once .* got \[\[0, 1\], \[1, 3\]\]"):
        env.arrange([[0, 1], [1, 3]])


def test_arranging_moves_environments_and_ends_their_episodes(counters):  # noqa: F811
    env = counters(4, 2)
    env.reset(ids(0, 1, 2, 3))
    env.arrange([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=r"\[0, 1, 2, 3\] have no running episode"):
        env.step_chunk(STEPS)
    env.reset(ids(0, 1), [0, 1])
    assert [report["simulators"] for report in env.worker_reports()] == [4, 2]  # the first group is in worker 0
    kept = env.reset(ids(2, 3), [2, 3])[STATE][:, 1].tolist()
    env.arrange([[0, 1], [2, 3]])  # as it is already: nothing is given up
    assert env.reset(ids(0, 1, 2, 3))[STATE][:, 1].tolist() == kept


def test_an_episode_that_could_not_start_fails_in_its_own_chunk(counters, caplog):  # noqa: F811
    env = counters(4, 2)
    env.arrange([[0, 1], [2, 3]])
    env.reset(ids(0, UNSTARTED, 2, RAISING))
    env.start_chunk(np.zeros_like(STEPS), FIRST)
    env.start_chunk(np.zeros_like(STEPS), SECOND)
    assert env.finish_chunk().failed.tolist() == [False, True, False, False]
    assert "environment 1 (a, state 99) broke down" in caplog.text
    assert not env.finish_chunk().failed.any()


def test_simulations_in_this_process_run_when_they_are_finished():
    with make_env("toy:point-mass", 4) as whole, make_env("toy:point-mass", 4) as parts:
        numbers = np.stack([np.zeros(4, np.int64), np.arange(4)], 1)
        whole.reset(numbers)
        before = parts.reset(numbers)[STATE]
        actions = np.random.default_rng(0).uniform(-1, 1, (4, 30, 2)).astype(np.float32)[:, :20]
        expected = whole.step_chunk(actions)
        given = actions.copy()
        parts.start_chunk(given, FIRST)
        given[:] = 0  # what was started is kept
        parts.start_chunk(actions, SECOND)
        with pytest.raises(ValueError, match=r"\[0\] are in a chunk"):
            parts.reset(numbers[:1], [0])
        first = parts.finish_chunk()
        np.testing.assert_array_equal(first.observation[STATE][2:], before[2:])
        assert_rows(first, expected, FIRST)
        parts.reset(numbers[:2], [0, 1])
        assert_rows(parts.finish_chunk(), expected, SECOND)
