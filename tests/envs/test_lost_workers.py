"""Worker processes that are killed, end by themselves or hang: replaced at once, and the other environments go on."""

import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest

from pi_rl.envs import worker_process

from .test_failures import SPEC, chunk, counters, ids  # noqa: F401
from .test_workers import alive

KILLED, LEFT, HUNG = 3, 4, 5  # what an action, or a state id of 80 (once) or 90 and this, has the simulator do
STATE = "observation.state"
CALM = [(0.25, 0)] * 2
HOW = [(KILLED, r"killed by signal 9"), (LEFT, "ended with exit code 4"), (HUNG, "did not answer for 2 s")]


@pytest.fixture(autouse=True)
def once(monkeypatch, tmp_path):
    monkeypatch.setenv("COUNTER_ONCE", str(tmp_path / "done"))


def limit(how):
    """Seconds; short where a hang is to be found."""
    return 2 if how == HUNG else 60


def totals(result):
    return result.observation[STATE][:, 0]


@pytest.mark.parametrize(("how", "message"), HOW)
def test_a_lost_worker_loses_its_own_episodes_and_the_others_go_on(counters, caplog, how, message):  # noqa: F811
    """Environments 1 and 3 share worker 1, which dies when it simulates 1; 3 had been simulated by no one yet."""
    sound, env = counters(4, 2), counters(4, 2, timeout=limit(how))
    for each in (sound, env):
        each.reset(ids(0, 1, 2, 3))
    pids = env.worker_pids
    result = env.step_chunk(chunk(CALM, [(0.5, 0), (0, how)], CALM, CALM))
    expected = sound.step_chunk(chunk(CALM, CALM, CALM, CALM))
    assert result.failed.tolist() == [False, True, False, True]
    assert result.done.tolist() == [False, True, False, True]
    assert result.steps.tolist() == [2, 0, 2, 0]
    assert not result.rewards[[1, 3]].any()
    for row in (0, 2):
        np.testing.assert_array_equal(result.rewards[row], expected.rewards[row])
        np.testing.assert_array_equal(result.observation[STATE][row], expected.observation[STATE][row])
    assert env.worker_restarts == 1
    assert (env.worker_pids[0], alive(pids[1])) == (pids[0], False)
    assert message in caplog.text
    assert "environment 3 (a, state 3) broke down" in caplog.text
    env.reset(ids(5, 6), [1, 3])
    result = env.step_chunk(chunk(CALM, CALM, CALM, CALM))
    assert not result.failed.any()
    np.testing.assert_allclose(totals(result), [1.0, 1.0, 1.2, 1.1], rtol=1e-6)


def test_what_the_worker_said_last_is_told(counters, caplog):  # noqa: F811
    env = counters(1, 1, timeout=limit(HUNG))
    for how in (LEFT, HUNG):
        env.reset(ids(0))
        env.step_chunk(chunk([(0, how)] * 2))
    assert "the simulator's library gave up" in caplog.text
    assert "broken_simulator.py" in caplog.text  # the line at which it hung
    assert "in leave" in caplog.text


def test_a_worker_that_goes_on_slowly_does_not_hang(counters):  # noqa: F811
    """Two environments of one worker wait for 1.8 s each, in which no single call takes longer than the timeout."""
    env = counters(2, 1, timeout=3)
    env.reset(ids(0, 0))
    result = env.step_chunk(chunk([(0.25, 2)] * 2, [(0.25, 2)] * 2))
    assert not result.failed.any()
    assert env.worker_restarts == 0


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_two_chunks_under_way(counters, num_workers):  # noqa: F811
    """The second stage's worker is lost; one worker for both loses what it had not finished of the first as well."""
    env = counters(4, num_workers)
    env.arrange([[0, 1], [2, 3]])
    env.reset(ids(0, 1, 2, 3))
    first, second = np.array([True, True, False, False]), np.array([False, False, True, True])
    steps = chunk(CALM, CALM, [(0, KILLED)] * 2, CALM)
    env.start_chunk(steps, first)
    env.start_chunk(steps, second)
    one = env.finish_chunk()
    assert not one.failed.any()
    two = env.finish_chunk()
    assert two.failed.tolist() == [False, False, True, num_workers < 4]
    assert env.worker_restarts == 1
    again = env.reset(ids(8, 9), [2, 3]) if num_workers < 4 else env.reset(ids(8), [2])
    assert again[STATE][2, 0] == pytest.approx(0.8)
    env.start_chunk(chunk(CALM, CALM, CALM, CALM), first)
    env.start_chunk(chunk(CALM, CALM, CALM, CALM), second)
    after = env.finish_chunk()
    assert after.failed.tolist() == [num_workers == 1] * 2 + [False] * 2  # they had a simulator in the lost worker
    assert not env.finish_chunk().failed.any()


def test_a_chunk_that_was_finished_before_the_loss_counts(counters):  # noqa: F811
    """Its answer came while another was waited for; the next chunk of that environment cannot be simulated."""
    env = counters(2, 1)
    env.reset(ids(0, 1))
    env.start_chunk(chunk(CALM, CALM), [True, False])
    env.start_chunk(chunk(CALM, [(0, KILLED)] * 2), [False, True])
    assert env.finish_chunk().rewards.sum(1).tolist() == [0.5, 0]
    assert env.finish_chunk().failed.tolist() == [False, True]
    env.reset(ids(1), [1])
    assert env.step_chunk(chunk(CALM, CALM)).failed.tolist() == [True, False]


def test_a_worker_that_died_between_commands_costs_no_reset(counters):  # noqa: F811
    env = counters(4, 2)
    env.reset(ids(0, 1, 2, 3))
    os.kill(env.worker_pids[1], signal.SIGKILL)
    assert env.reset(ids(4, 5, 6, 7))[STATE][:, 0] == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert not env.step_chunk(chunk(CALM, CALM, CALM, CALM)).failed.any()
    assert env.worker_restarts == 1


@pytest.mark.parametrize("how", [KILLED, LEFT, HUNG])
def test_a_reset_is_tried_again_and_then_its_episode_fails(counters, how):  # noqa: F811
    env = counters(2, 2, timeout=limit(how))
    assert env.reset(ids(0, 80 + how))[STATE][1, 0] == pytest.approx(0.1 * (80 + how))
    assert env.worker_restarts == 1
    env.step_chunk(chunk(CALM, [(0, 0)] * 2))  # above 3: solved, so that the count begins anew
    env.reset(ids(0, 90 + how))
    assert env.worker_restarts == 3
    assert env.step_chunk(chunk(CALM, CALM)).failed.tolist() == [False, True]
    env.reset(ids(0), [1])
    assert not env.step_chunk(chunk(CALM, CALM)).failed.any()


@pytest.mark.parametrize("how", [KILLED, HUNG])
def test_an_expert_is_run_again_and_then_has_failed(counters, how):  # noqa: F811
    requests = [{"task": "a", "state_id": state} for state in (0, 80 + how, 1, 90 + how, 2)]
    sound, env = counters(3, 2), counters(3, 2, timeout=limit(how))
    env.reset(ids(0, 0, 0))
    expected = list(sound.rollout_experts([request for request in requests if request["state_id"] < 90 - 10]))
    episodes = list(env.rollout_experts(requests))
    assert [episode["state_id"] for episode in episodes] == [0, 80 + how, 1, 90 + how, 2]
    assert [episode["success"] for episode in episodes] == [True, True, True, False, True]
    assert episodes[3]["actions"].shape == (0, 3)
    assert episodes[3]["states"].shape == (0, 2)
    assert env.worker_restarts == 3
    for episode, other in zip([episodes[i] for i in (0, 2, 4)], expected, strict=True):
        np.testing.assert_array_equal(episode["actions"], other["actions"])
        np.testing.assert_array_equal(episode["states"][:, 0], other["states"][:, 0])
        for camera in SPEC.cameras:
            np.testing.assert_array_equal(episode["images"][camera], other["images"][camera])


def test_frames_of_a_lost_worker_are_black(counters):  # noqa: F811
    env = counters(2, 2)
    env.reset(ids(0, 1))
    env.step_chunk(chunk(CALM, CALM))
    os.kill(env.worker_pids[1], signal.SIGKILL)
    frames = env.render([0, 1], 4, 4)
    assert [np.unique(frame).tolist() for frame in frames] == [[2], [0]]
    assert env.step_chunk(chunk(CALM, CALM)).failed.tolist() == [False, True]
    env.reset(ids(1, 99))
    assert not env.render([1], 4, 4).any()  # of an episode that could not start there is no picture either


def test_a_worker_lost_again_and_again_stops_the_run_with_its_last_words(counters):  # noqa: F811
    env = counters(4, 2)
    env.reset(ids(0, 1, 2, 3))
    for attempt in range(2):
        env.step_chunk(chunk(CALM, [(0, LEFT)] * 2, CALM, CALM))
        env.reset(ids(attempt, 3), [1, 3])
    with pytest.raises(RuntimeError, match=r"3 times in a row that worker 1 of 2 .*(?s:.*)library gave up$"):
        env.step_chunk(chunk(CALM, [(0, LEFT)] * 2, CALM, CALM))
    assert not any(alive(pid) for pid in env.worker_pids)
    with pytest.raises(RuntimeError, match="was closed"):
        env.reset(ids(0, 1, 2, 3))


def test_an_episode_that_ends_between_losses_begins_the_count_anew(counters):  # noqa: F811
    env = counters(2, 1)
    for how in (KILLED, KILLED, 0, KILLED, KILLED):
        env.reset(ids(0, 0))
        result = env.step_chunk(chunk([(3, how)] * 2, CALM))
        assert result.failed[0] == (how == KILLED)
    assert env.worker_restarts == 4


@pytest.mark.parametrize(
    ("how", "message"), [(LEFT, "exit code 4 while it started.*(?s:.*)gave up$"), (KILLED, "signal 9")]
)
def test_a_worker_that_dies_while_it_starts_stops_the_run(counters, how, message):  # noqa: F811
    env = counters(2, 2, start=how)
    with pytest.raises(RuntimeError, match=message):
        env.reset(ids(0, 0))
    assert not any(alive(pid) for pid in env.worker_pids)


def test_a_replacement_that_does_not_start_stops_the_run(counters):  # noqa: F811
    env = counters(1, 1, restart=LEFT)
    env.reset(ids(0))
    with pytest.raises(RuntimeError, match="ended with exit code 4 while it started"):
        env.step_chunk(chunk([(0, KILLED)] * 2))


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_must_be_a_time(counters, timeout):  # noqa: F811
    with pytest.raises(ValueError, match="worker_timeout_s must be a number of seconds above 0"):
        counters(1, timeout=timeout)


def test_a_hung_worker_does_not_outlive_its_parent(tmp_path):
    """The parent is killed while its worker hangs and so reads no socket."""
    code = f"""
import os, signal, sys, threading, time, numpy as np
sys.path[:0] = [{os.path.dirname(__file__)!r}]
from pi_rl.envs.vector_env import EnvSpec
from pi_rl.envs.workers import WorkerVectorEnv
spec = EnvSpec("counter:a", ("a",), ("do a",), {{}}, 2, 3, 20, 10, (-9.0,) * 3, (9.0,) * 3)
env = WorkerVectorEnv(spec, "broken_simulator:CounterBackend", {{}}, 1, 1)
env.reset(np.array([[0, 0]]))
env.start_chunk(np.array([[[0, {HUNG}, 0]]], np.float32))
time.sleep(0.5)
print(*env.worker_pids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (pid,) = map(int, done.stdout.split())
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


def test_a_process_that_the_kernel_does_not_let_go_is_left_to_itself(counters, monkeypatch, caplog):  # noqa: F811
    """As one that waits for a dead disk: neither the run nor its end waits for it."""
    monkeypatch.setattr(worker_process, "CLOSE_TIMEOUT_S", 0.3)
    env = counters(2, 2, timeout=limit(HUNG))
    env.reset(ids(0, 1))
    stuck = [worker.popen for worker in env._workers]
    for popen in stuck:
        popen.kill = lambda: None
    try:
        assert env.step_chunk(chunk(CALM, [(0, HUNG)] * 2)).failed.tolist() == [False, True]
        assert f"(pid {stuck[1].pid}) did not end 0.3 s after it was killed" in caplog.text
        os.kill(stuck[0].pid, signal.SIGSTOP)
        env.close()
        assert f"(pid {stuck[0].pid}) did not end 0.3 s after it was killed" in caplog.text
    finally:
        for popen in stuck:
            os.kill(popen.pid, signal.SIGKILL)
            popen.wait()


def test_a_worker_that_stops_in_the_middle_of_a_message_is_given_up():
    """Only the length of the message and a part of it come; of its long output only the end is read."""
    ours, theirs = socket.socketpair()
    stderr = tempfile.TemporaryFile()
    stderr.write(b"x" * 10**6 + b" the last word")
    stderr.flush()
    popen = subprocess.Popen(["sleep", "600"])
    worker = worker_process.WorkerProcess(0, popen, Connection(ours.detach()), stderr, np.zeros((), np.int64), 1.0)
    worker.limit(0.5)
    with theirs:
        theirs.sendall(struct.pack("!i", 100) + b"half")
        ((_, lost),) = worker_process.listen([worker])
    assert "did not answer for 0.5 s" in str(lost)
    assert len(lost.last_words) == worker_process.STDERR_TAIL_CHARACTERS
    assert lost.last_words.endswith("the last word")
    assert popen.returncode is not None
