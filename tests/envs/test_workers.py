import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pi_rl.envs.registry import make_env
from pi_rl.envs.renderer import child_environment, choose_renderer

FAST = {"image_size": 32, "fast_rendering": True, "hide_arm": True, "max_episode_steps": 60}
IMAGE, STATE = "observation.image", "observation.state"
IDS = np.array([[0, 3], [1, 4], [1, 5], [0, 6]])
ONES = np.ones((4, 1, 4), np.float32)


def blind_env(num_envs=2, num_workers=2, **options):
    return make_env("metaworld:handle-press-v3", num_envs, num_workers, **{**FAST, "blind": True, **options})


def copy_of(result):
    return [
        result.observation[IMAGE],
        result.observation[STATE],
        result.rewards,
        result.terminated,
        result.truncated,
        result.steps,
    ]


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_observations_have_the_promised_form(two_workers):
    observation = two_workers.reset(IDS)
    assert observation[IMAGE].shape == (4, 32, 32, 3)
    assert observation[IMAGE].dtype == np.uint8
    assert observation[STATE].shape == (4, 4)
    assert observation[STATE].dtype == np.float32
    press, drawer = two_workers.spec.instructions
    assert observation["task"] == [press, drawer, drawer, press]
    kept = observation[IMAGE].copy()
    two_workers.step_chunk(np.repeat(ONES, 5, axis=1))
    np.testing.assert_array_equal(observation[IMAGE], kept)  # later chunks do not write into what was returned


def test_results_do_not_depend_on_workers_or_on_what_ran_before(one_worker, two_workers, actions):
    def run(env):
        first = env.reset(IDS)
        results = [env.step_chunk(actions), env.step_chunk(-actions)]
        second = env.reset(np.array([[1, 3], [0, 1]]), [0, 2])  # other tasks than before in these
        results.append(env.step_chunk(actions[:, :3]))
        return [first[IMAGE], first[STATE], second[IMAGE], second[STATE], *(a for r in results for a in copy_of(r))]

    once = run(one_worker)
    assert_same(run(two_workers), once)
    assert_same(run(one_worker), once)


def test_simulators_are_reused(two_workers):
    two_workers.reset(IDS)
    made = [report["simulators"] for report in two_workers.worker_reports()]
    two_workers.reset(IDS + np.array([0, 1]))
    assert [report["simulators"] for report in two_workers.worker_reports()] == made


def test_a_task_switch_keeps_the_simulator_for_later():
    with make_env("metaworld:handle-press-v3,reach-v3", 1, 1, **{**FAST, "blind": True}) as env:
        for task in (0, 1, 0, 1):
            env.reset(np.array([[task, 0]]))
        assert env.worker_reports()[0]["simulators"] == 2


@pytest.mark.parametrize(("task", "rows"), [(0, [0, 3]), (1, [1, 2])])
def test_tasks_in_one_process_do_not_corrupt_each_others_images(one_worker, actions, task, rows):
    """With both tasks drawn in turns in one process, pixels equal those of a process that knows only one of them."""
    reset = one_worker.reset(IDS)
    chunk = one_worker.step_chunk(actions)
    with make_env(f"metaworld:{one_worker.spec.tasks[task]}", 2, 1, **FAST) as lone:
        alone = lone.reset(np.array([[0, IDS[row, 1]] for row in rows]))
        assert alone[IMAGE].std() > 10
        np.testing.assert_array_equal(alone[IMAGE], reset[IMAGE][rows])
        after = lone.step_chunk(actions[rows])
        np.testing.assert_array_equal(after.observation[IMAGE], chunk.observation[IMAGE][rows])


def test_workers_import_no_learning_library(two_workers):
    for report in two_workers.worker_reports():
        assert {"metaworld", "mujoco", "numpy"} <= set(report["modules"])
        assert not {"torch", "transformers", "lerobot", "jax", "tensorflow"} & set(report["modules"])


def test_a_chunk_stops_where_the_task_is_solved(two_workers):
    (episode,) = two_workers.rollout_experts([{"task": "handle-press-v3", "state_id": 3, "frames": False}])
    n = len(episode["actions"])
    assert episode["success"]
    assert n % 5 != 0  # so that the end falls inside a chunk
    two_workers.reset(IDS)
    padded = np.zeros((4, -(-n // 5) * 5 + 5, 4), np.float32)
    padded[0, :n] = episode["actions"]
    active = np.array([True, False, False, False])
    chunks = [two_workers.step_chunk(padded[:, i : i + 5], active) for i in range(0, n, 5)]
    assert all(not chunk.terminated.any() and chunk.rewards.sum() == 0 for chunk in chunks[:-1])
    last = chunks[-1]
    assert last.terminated.tolist() == last.success.tolist() == last.done.tolist() == [True, False, False, False]
    assert not last.truncated.any()
    assert last.steps.tolist() == [n % 5, 0, 0, 0]
    assert np.flatnonzero(last.rewards[0]).tolist() == [n % 5 - 1]
    assert last.rewards.sum() == 1.0
    with pytest.raises(ValueError, match=r"\[0\] have no running episode"):
        two_workers.step_chunk(padded[:, :5], active)
    two_workers.reset(IDS[:1], [0])
    assert not two_workers.step_chunk(padded[:, :5], active).done.any()


def test_the_time_limit_truncates_with_a_true_final_observation(two_workers):
    away = np.zeros((4, 25, 4), np.float32)
    away[..., 2] = 1.0
    two_workers.reset(IDS)
    first, second, third = (two_workers.step_chunk(away) for _ in range(3))
    assert not first.done.any()
    assert second.steps.tolist() == [25] * 4
    assert third.steps.tolist() == [10] * 4  # 60 in all
    assert third.truncated.all()
    assert not third.terminated.any()
    assert not third.success.any()
    assert third.rewards.sum() == 0
    two_workers.reset(IDS)
    two_workers.step_chunk(np.repeat(away, 2, axis=1))
    just_before = two_workers.step_chunk(away[:, :9])
    assert not just_before.done.any()
    end = two_workers.step_chunk(away[:, :1])
    assert end.truncated.all()
    np.testing.assert_array_equal(end.observation[IMAGE], third.observation[IMAGE])
    np.testing.assert_array_equal(end.observation[STATE], third.observation[STATE])


def test_inactive_environments_are_not_simulated(two_workers, actions):
    same = np.array([[0, 3]] * 4)
    actions = np.repeat(actions[:1], 4, axis=0)
    two_workers.reset(same)
    first = two_workers.step_chunk(actions, [True, True, False, False])
    assert first.steps.tolist() == [5, 5, 0, 0]
    second = two_workers.step_chunk(actions, [False, False, True, True])
    assert second.steps.tolist() == [0, 0, 5, 5]
    np.testing.assert_array_equal(second.observation[STATE][2], first.observation[STATE][0])
    np.testing.assert_array_equal(second.observation[IMAGE][3], first.observation[IMAGE][0])


def test_videos_do_not_disturb_the_policys_images(two_workers, actions):
    def run(draw):
        images = [two_workers.reset(IDS)[IMAGE]]
        for _ in range(2):
            if draw:
                assert two_workers.render([3, 1], 40, 56).shape == (2, 40, 56, 3)
            images.append(two_workers.step_chunk(actions).observation[IMAGE])
        return images

    assert_same(run(draw=True), run(draw=False))
    shown, hidden = (two_workers.render([0], 48, 48, show_arm=show) for show in (True, False))
    assert not np.array_equal(shown, hidden)
    assert two_workers.render([], 8, 8).shape == (0, 8, 8, 3)
    with pytest.raises(ValueError, match="1 to 2048 pixels .*got 0 x 8"):
        two_workers.render([0], 0, 8)


def test_experts_are_reproducible_and_leave_the_environments_alone(one_worker, two_workers, actions):
    requests = [
        {"task": task, "state_id": state, "noise_std": noise, "noise_seed": 11, "max_steps": 70}
        for task, state, noise in [(0, 3, 0.0), (0, 4, 0.3), (1, 5, 2.0), (0, 5, 0.0)]
    ]
    two_workers.reset(IDS)
    before = two_workers.step_chunk(actions)
    episodes = list(two_workers.rollout_experts(requests))
    after = two_workers.step_chunk(actions)
    assert [episode["state_id"] for episode in episodes] == [3, 4, 5, 5]
    for one, other in zip(episodes, one_worker.rollout_experts(requests), strict=True):
        assert one["success"] == other["success"]
        for key in ("actions", "states"):
            np.testing.assert_array_equal(one[key], other[key])
        if one["success"]:
            np.testing.assert_array_equal(one["images"][IMAGE], other["images"][IMAGE])
    two_workers.reset(IDS)
    assert_same(copy_of(two_workers.step_chunk(actions)), copy_of(before))
    assert_same(copy_of(two_workers.step_chunk(actions)), copy_of(after))
    clean, failed = episodes[0], episodes[2]
    n = len(clean["actions"])
    assert clean["success"]
    assert clean["actions"].shape == clean["states"].shape == (n, 4)
    assert clean["images"][IMAGE].shape == (n, 32, 32, 3)
    assert np.abs(episodes[1]["actions"]).max() <= 1.0
    assert not failed["success"]
    assert failed["images"] is None
    assert len(failed["actions"]) == 70  # the environments' own limit, 60, does not bind experts


def test_expert_frames_are_what_the_policy_would_have_seen(two_workers):
    (episode,) = two_workers.rollout_experts([{"task": 0, "state_id": 3}])
    seen = two_workers.reset(IDS)
    for t in range(4):
        np.testing.assert_array_equal(episode["images"][IMAGE][t], seen[IMAGE][0])
        np.testing.assert_array_equal(episode["states"][t], seen[STATE][0])
        step = np.repeat(episode["actions"][None, t : t + 1], 4, axis=0)
        seen = two_workers.step_chunk(step, [True, False, False, False]).observation


def test_an_unfinished_expert_iterator_blocks_and_can_be_closed(two_workers):
    requests = ({"task": 0, "state_id": i, "max_steps": 5, "frames": False} for i in range(100))
    episodes = two_workers.rollout_experts(requests)
    next(episodes)
    with pytest.raises(RuntimeError, match="unfinished"):
        two_workers.reset(IDS)
    episodes.close()
    two_workers.reset(IDS)
    with pytest.raises(
        ValueError, match="'push-v3' is not in this environment; it has handle-press-v3, drawer-open-v3"
    ):
        list(two_workers.rollout_experts([{"task": "push-v3", "state_id": 0}]))
    with pytest.raises(ValueError, match="task index 2 is out of range 0 to 1"):
        list(two_workers.rollout_experts([{"task": 2, "state_id": 0}]))
    two_workers.reset(IDS)


def test_blind_environments_see_grey_and_never_draw():
    with blind_env(num_workers=1) as env:
        with pytest.raises(ValueError, match=r"\[0\] have no episode"):
            env.render([0], 8, 8)
        assert (env.reset(np.array([[0, 1], [0, 2]]))[IMAGE] == 127).all()
        result = env.step_chunk(np.ones((2, 5, 4), np.float32))
        assert (result.observation[IMAGE] == 127).all()
        assert not np.array_equal(*result.observation[STATE])


def test_closing_ends_the_workers_and_leaks_nothing():
    before = set(os.listdir("/proc/self/fd"))
    env = blind_env(num_workers=5)
    assert env.num_workers == 2  # never more than environments
    pids = env.worker_pids
    env.reset(np.array([[0, 1], [0, 2]]))
    env.close()
    env.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)  # neither running nor zombies
    with pytest.raises(RuntimeError, match="was closed"):
        env.reset(np.array([[0, 1], [0, 2]]))
    del env
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr("pi_rl.envs.workers.choose_renderer", lambda: "broken")
    env = blind_env(num_envs=1)
    with pytest.raises(RuntimeError, match="worker 0 failed with RuntimeError: invalid value for .*MUJOCO_GL"):
        env.reset(np.array([[0, 1]]))


def test_a_bad_value_found_in_a_worker_is_a_value_error():
    bounds = {"handle-press-v3": {"low": [0] * 6, "high": [0] * 6}}
    env = blind_env(num_envs=1, object_range=bounds)
    with pytest.raises(ValueError, match="must have 3 numbers"):
        env.reset(np.array([[0, 1]]))


def test_workers_end_with_their_parent():
    code = """
import os, signal, numpy as np
from pi_rl.envs.registry import make_env
env = make_env("metaworld:handle-press-v3", 2, 2, blind=True)
env.reset(np.array([[0, 1], [0, 2]]))
print(*env.worker_pids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment(choose_renderer()),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def test_the_package_is_light_for_workers():
    code = "import sys, pi_rl.envs.worker; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment("egl"), capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "lerobot", "mujoco", "metaworld"} & set(done.stdout.split())
