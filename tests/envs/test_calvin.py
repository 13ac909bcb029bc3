"""CALVIN through real worker processes on a stand-in checkout; on a real one with -m calvin and PI_RL_CALVIN_ROOT."""

import ast
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from pi_rl.envs import calvin_install
from pi_rl.envs.calvin_options import GRIPPER_CAMERA, STATIC_CAMERA, CalvinOptions, sequences_of
from pi_rl.envs.calvin_sequences import PUBLISHED_DIGEST, digest_of, evaluation_sequences, fnv_hash
from pi_rl.envs.registry import check_name_and_options, make_env, parse_name
from pi_rl.envs.vector_env import TRAIN_STATE_OFFSET
from pi_rl.envs.workers import WorkerVectorEnv

ROOT = Path(__file__).parents[2]
STANDIN = ROOT / "tests" / "envs" / "calvin_standin"
STATE = "observation.state"
AXES = {
    "move_slider_left": (0, 1), "move_slider_right": (0, -1), "open_drawer": (1, 1), "close_drawer": (1, -1),
    "turn_on_led": (2, 1), "turn_off_led": (2, 1), "turn_on_lightbulb": (3, 1), "turn_off_lightbulb": (3, -1),
    "rotate_red_block_left": (5, 1), "rotate_red_block_right": (5, -1),
}  # fmt: skip
"""Subtask of the stand-in to the axis of the action that solves it, and its sign."""
IDLE = [0, 0, 0, 0, 0, 0, 1]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def standin(monkeypatch, cache):
    """The stand-in is the user's checkout, this interpreter (under another path) the one that has pybullet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("PI_RL_CALVIN_ROOT", str(STANDIN))
    python = Path(sys.executable)
    monkeypatch.setenv("PI_RL_CALVIN_PYTHON", f"{python.parent}/./{python.name}")
    monkeypatch.setattr(calvin_install, "REQUIRED_MODULES", ("numpy", "yaml", "hydra", "omegaconf"))


@pytest.fixture
def calvin(standin):
    opened = []

    def make(name="calvin:d_d", num_envs=1, **options):
        opened.append(make_env(name, num_envs, **{"static_size": 16, "gripper_size": 8, **options}))
        return opened[-1]

    yield make
    for env in opened:
        env.close()


def ids(*states, task=0):
    return np.array([[task, state] for state in states])


def subtasks(state, scenes="D"):
    return sequences_of(None).episode(state, scenes).subtasks


def solve(subtask):
    axis, sign = AXES[subtask]
    action = list(IDLE)
    action[axis] = sign
    if axis == 5:
        action[6] = -0.2  # closes
    return action


def chunk(action, length=12):
    """Actions (1, length, 7)."""
    return np.repeat(np.array([[action]], np.float32), length, axis=1)


def play(env, state, upto=5):
    """Solves the first subtasks of a sequence; returns the results of its chunks."""
    env.reset(ids(state))
    return [env.step_chunk(chunk(solve(subtask), 9)) for subtask in subtasks(state)[:upto]]


def test_a_sequence_of_five_pays_one_for_each_and_tells_the_next(calvin):
    env = calvin()
    names = subtasks(3)
    sentences = [sequences_of(None).sentence(name) for name in names]
    assert len(set(sentences)) == 5
    assert env.reset(ids(3))["task"] == [sentences[0]]
    total = 0.0
    for position, name in enumerate(names):
        result = env.step_chunk(chunk(solve(name)))
        total += result.rewards.sum()
        assert set(np.unique(result.rewards)) == {0.0, 1.0}
        assert total == position + 1
        last = position == 4
        assert result.observation["task"] == [sentences[position if last else position + 1]]
        assert (result.terminated[0], result.success[0], result.truncated[0]) == (last, last, False)
    assert result.steps[0] == np.flatnonzero(result.rewards[0])[0] + 1 < 12  # the rest of the chunk is left out


def test_the_wrong_subtask_pays_nothing(calvin):
    env = calvin()
    first, second = subtasks(3)[:2]
    env.reset(ids(3))
    assert env.step_chunk(chunk(solve(second))).rewards.sum() == 0
    assert env.step_chunk(chunk(solve(first))).rewards.sum() == 1
    # done before it was asked for: the change since the request is what counts
    assert env.step_chunk(chunk(solve(second))).rewards.sum() == 0


def test_an_unsolved_subtask_ends_the_episode_when_its_time_is_up(calvin):
    env = calvin(steps_per_subtask=20)
    first = subtasks(3)[0]
    env.reset(ids(3))
    assert not env.step_chunk(chunk(IDLE, 10)).done[0]
    solved = env.step_chunk(chunk(solve(first), 10))
    assert (solved.rewards.sum(), solved.done[0]) == (1, False)
    left = int(10 - np.flatnonzero(solved.rewards[0])[0] - 1)
    ended = env.step_chunk(chunk(IDLE, 40))
    assert ended.steps[0] == 20 - left  # the next subtask has 20 steps of its own
    assert (ended.terminated[0], ended.success[0], ended.truncated[0]) == (True, False, False)
    with pytest.raises(ValueError, match=r"\[0\] have no running episode"):
        env.step_chunk(chunk(IDLE))


def test_the_time_limit_of_the_episode_truncates(calvin):
    env = calvin(max_episode_steps=30)
    env.reset(ids(3))
    result = env.step_chunk(chunk(IDLE, 30))
    assert (result.truncated[0], result.terminated[0], result.steps[0]) == (True, False, 30)
    spec = check_name_and_options("calvin:abc_d", {})
    assert (spec.max_episode_steps, spec.eval_states, spec.subtasks) == (1800, 1000, 5)


def test_an_episode_depends_on_its_id_only(calvin):
    env = calvin()
    once = [play(env, 5), play(env, 8, upto=2), play(env, 5)]
    other = calvin()
    for result, again, elsewhere in zip(once[0], once[2], play(other, 5), strict=True):
        for second in (again, elsewhere):
            np.testing.assert_array_equal(second.observation[STATE], result.observation[STATE])
            np.testing.assert_array_equal(second.rewards, result.rewards)
            seen, before = (r.observation[STATIC_CAMERA].copy() for r in (second, result))
            seen[:, 0, 0] = before[:, 0, 0]  # the stand-in's count of pictures
            np.testing.assert_array_equal(seen, before)
    assert sum(result.rewards.sum() for result in once[2]) == 5


def test_switches_follow_the_lights_that_are_on_at_the_start(calvin):
    """calvin_env sets switches before lights: after one reset, the first press of a lit button does nothing."""
    env = calvin()
    lit = next(state for state in range(1000) if subtasks(state)[0] == "turn_off_led")
    for _ in range(2):
        env.reset(ids(lit))
        assert env.step_chunk(chunk(solve("turn_off_led"), 9)).rewards.sum() == 1


def test_environments_have_a_process_each_and_do_not_disturb_each_other(calvin):
    alone = calvin()
    expected = play(alone, 4)
    pair = calvin(num_envs=2, num_workers=1)
    assert pair.num_workers == 2
    pair.reset(ids(4, 9))
    for subtask, result in zip(subtasks(4), expected, strict=True):
        both = np.concatenate([chunk(solve(subtask), 9), chunk(IDLE, 9)])
        seen = pair.step_chunk(both)
        np.testing.assert_array_equal(seen.rewards[:1], result.rewards)
        np.testing.assert_array_equal(seen.observation[STATE][:1], result.observation[STATE])
        assert seen.observation["task"][1] == sequences_of(None).sentence(subtasks(9)[0])
    assert not np.array_equal(seen.observation[STATE][0], seen.observation[STATE][1])


def test_two_episodes_in_one_process_are_refused(caplog):
    options = CalvinOptions(static_size=16, gripper_size=8).located()
    spec = check_name_and_options("calvin:d_d", {"static_size": 16, "gripper_size": 8})
    with WorkerVectorEnv(spec, "calvin", vars(options), 2, 1) as env:
        env.reset(ids(1, 2))
        result = env.step_chunk(np.repeat(chunk(IDLE, 2), 2, axis=0))
        assert result.failed.tolist() == [True, False]
        assert "there must be one worker per environment" in caplog.text


def test_observations_have_the_promised_form(calvin):
    env = calvin(joint_state=True)
    observation = env.reset(ids(0))
    assert observation[STATIC_CAMERA].shape == (1, 16, 16, 3)
    assert observation[GRIPPER_CAMERA].shape == (1, 8, 8, 3)
    np.testing.assert_allclose(observation[STATE][0, :14], np.linspace(0.1, 0.2, 15)[:14], rtol=1e-6)
    assert observation[STATE][0, 14] == 1
    moved = env.step_chunk(chunk([1, -0.5, 0, 0, 0, 5.0, -0.01], 1)).observation[STATE][0]
    np.testing.assert_allclose(moved[:2] - observation[STATE][0, :2], [0.0201, -0.0099], atol=1e-6)
    np.testing.assert_allclose(moved[5] - observation[STATE][0, 5], 0.0501, atol=1e-6)  # clipped
    assert moved[14] == -1  # the gripper is open or closed, nothing between
    assert env.render([0], 20, 30).shape == (1, 20, 30, 3)
    small = calvin(blind=True)
    assert small.reset(ids(0))[STATE].shape == (1, 7)
    assert (small.step_chunk(chunk(IDLE)).observation[GRIPPER_CAMERA] == 127).all()


def test_pictures_are_drawn_once_a_chunk(calvin):
    env = calvin()
    first = env.reset(ids(0))[STATIC_CAMERA][0, 0, 0, 0]
    later = env.step_chunk(chunk(IDLE, 30)).observation[STATIC_CAMERA][0, 0, 0, 0]
    assert later - first == 2  # two cameras


def test_under_egl_the_simulator_is_made_anew_now_and_then(calvin):
    made = {}
    for egl in (False, True):
        env = calvin(egl=egl)
        made[egl] = [int(env.reset(ids(0))[STATIC_CAMERA][0, 0, 5, 0]) for _ in range(22)]
    assert made[False] == [1] * 22
    assert made[True] == [1] * 20 + [2] * 2


def test_evaluation_is_in_d_and_training_in_the_scenes_of_the_name(calvin):
    env = calvin("calvin:abc_d")
    seen = {}
    for state in (0, 999, *range(TRAIN_STATE_OFFSET, TRAIN_STATE_OFFSET + 8)):
        image = env.reset(ids(state))[STATIC_CAMERA][0]
        seen[state] = chr(image[0, 1, 0])
        assert image[0, 2:5, 0].tolist() == [10, 20, 30]  # red, blue, pink, in whatever order a scene's file has them
        assert seen[state] == sequences_of(None).episode(state, "ABC").scene
    assert seen.pop(0) == seen.pop(999) == "D"
    assert set(seen.values()) == set("ABC")
    assert {sequences_of(None).episode(TRAIN_STATE_OFFSET + i, "D").scene for i in range(5)} == {"D"}


def test_training_never_has_an_evaluation_sequence():
    sequences = sequences_of(None)
    evaluation = {tuple(sequences.episode(state, "D").condition.items()) + subtasks(state) for state in range(1000)}
    training = [sequences.episode(TRAIN_STATE_OFFSET + state, "D") for state in range(300)]
    drawn = {tuple(episode.condition.items()) + episode.subtasks for episode in training}
    assert not drawn & evaluation
    assert len(drawn) > 290
    assert training[7] == type(sequences)(STANDIN).episode(TRAIN_STATE_OFFSET + 7, "D")


def test_sequences_are_kept_in_the_users_cache(cache, caplog, monkeypatch, tmp_path):
    rules = sequences_of(None).rules
    (file,) = cache.glob("pi_rl/calvin_sequences_*.json")
    kept = json.loads(file.read_text())
    drawn = evaluation_sequences(rules)
    assert [(condition, tuple(names)) for condition, names in kept] == drawn
    assert digest_of(drawn) != PUBLISHED_DIGEST
    assert all(len({AXES[name][0] for name in names}) == 5 for _, names in drawn)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    again = type(sequences_of(None))(STANDIN)
    assert again.episode(0, "D") == sequences_of(None).episode(0, "D")
    assert "other evaluation sequences than the published ones" in caplog.text
    assert "could not be kept" in caplog.text


def test_the_hash_is_pyhashs():
    condition = {
        "led": 1, "lightbulb": 1, "slider": "left", "drawer": "open", "red_block": "slider_left",
        "blue_block": "table", "pink_block": "slider_right", "grasped": 0,
    }  # fmt: skip
    assert [fnv_hash(""), fnv_hash("a"), fnv_hash(str(condition.values()))] == [0, 1627429043, 2138410836]


def test_names_and_options():
    assert parse_name("calvin_abc_d") == parse_name("calvin:abc_d") == ("calvin", ("abc_d",))
    for options, message in (
        ({"static_size": 4}, "static_size .*8 to 2048, got 4"),
        ({"steps_per_subtask": 0}, "steps_per_subtask must be at least 1, got 0"),
        ({"max_episode_steps": -1}, "max_episode_steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_name_and_options("calvin:d_d", options)
    with pytest.raises(ValueError, match="state id 1000 .* evaluation states 0 to 999"):
        make_env("calvin:d_d", 1, static_size=16).reset(ids(1000))


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_what_is_missing_is_named_with_the_commands_that_install_it(monkeypatch, tmp_path):
    install = r"(?s){}.*git clone .*uv venv --python 3.11 .*uv pip install .*pybullet==3.2.7 .*PI_RL_CALVIN_ROOT"

    def fails(message, **options):
        with pytest.raises(FileNotFoundError, match=install.format(message)):
            make_env("calvin:d_d", 1, **options)

    with monkeypatch.context() as patched:
        patched.setattr(calvin_install, "REQUIRED_MODULES", ("numpy", "no_such_module"))
        fails(r"lacks the module\(s\) no_such_module\.")
    fails("checkout /nowhere is not a directory", root="/nowhere")
    fails(r"lacks calvin_models/.*calvin_env/data", root=str(tmp_path))
    fails("interpreter /no/python for CALVIN is not an executable", python="/no/python")
    fails(r"does not run \(cannot\)", python=executable(tmp_path / "broken", "#!/bin/sh\necho cannot >&2\nexit 3\n"))
    fails("Python 3.8.10; pi_rl's workers need 3.11", python=executable(tmp_path / "old", OLD_PYTHON))
    monkeypatch.delenv("PI_RL_CALVIN_PYTHON")
    fails("no interpreter for CALVIN.*there is no .*calvin_standin/.venv/bin/python")
    monkeypatch.delenv("PI_RL_CALVIN_ROOT")
    fails("no CALVIN checkout: the option root and PI_RL_CALVIN_ROOT are both unset")


OLD_PYTHON = "#!/bin/sh\necho '[[3, 8, 10], []]'\n"


def test_the_page_has_the_commands_of_the_messages():
    page = (ROOT / "docs" / "calvin.md").read_text(encoding="utf-8")
    commands = [line for line in calvin_install.INSTALL.splitlines() if line.startswith("    ")]
    assert len(commands) == 4
    assert all(command in page for command in commands)


def test_a_module_that_cannot_be_imported_is_named(monkeypatch, tmp_path):
    for part in ("calvin_models", "calvin_env/conf", "calvin_env/data"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).symlink_to(STANDIN / part)
    envs = tmp_path / "calvin_env/calvin_env/envs"
    envs.mkdir(parents=True)
    (envs / "play_table_env.py").write_text("import pybullet_of_tomorrow\n")
    env = make_env("calvin:d_d", 1, root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="(?s)cannot import CALVIN: .*pybullet_of_tomorrow.*uv pip install"):
        env.reset(ids(0))


def test_what_the_workers_import_is_python_3_11():
    package = Path(calvin_install.__file__).parent
    names = ("calvin", "calvin_install", "calvin_options", "calvin_sequences", "worker", "vector_env", "simulator")
    for name in names:
        ast.parse((package / f"{name}.py").read_text(), feature_version=(3, 11))


def test_another_interpreter_does_not_see_this_ones_packages(calvin, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/users/own")
    env = calvin()
    env.reset(ids(0))
    (report,) = env.worker_reports()
    assert not {"torch", "lerobot", "mujoco", "gymnasium"} & set(report["modules"])
    environment = Path(f"/proc/{report['pid']}/environ").read_text().split("\0")
    assert "PYTHONPATH=/users/own" in environment


@pytest.mark.slow
def test_a_policy_is_trained_and_evaluated(tmp_path):
    """One iteration of PPO, and an evaluation whose average length is what the scripted episodes would count."""
    from pi_rl.policies.small.create import create_small_policy
    from pi_rl.trainer.flow_ppo_config import FlowPPOConfig
    from pi_rl.trainer.flow_ppo_trainer import FlowPPOTrainer

    options = {"static_size": 32, "gripper_size": 32, "max_episode_steps": 40, "steps_per_subtask": 20}
    spec = check_name_and_options("calvin:abc_d", options)
    assert set(spec.sentences()) == {sequences_of(None).sentence(subtask) for subtask in AXES}
    policy = create_small_policy(
        "pi0",
        cameras=spec.cameras,
        state_dim=spec.state_dim,
        action_dim=spec.action_dim,
        image_size=32,
        chunk_size=5,
        n_action_steps=5,
        denoising_steps=2,
        instructions=spec.sentences(),
        output_dir=tmp_path / "policy",
        seed=0,
    )
    args = FlowPPOConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, num_iterations=1, num_envs=2, rollout_chunks=8, seed=0,
        per_device_train_batch_size=8, update_epochs=1, noise="flow_sde", eval_episodes=4, disable_tqdm=True,
    )  # fmt: skip
    trainer = FlowPPOTrainer(str(policy), args, "calvin:abc_d", options)
    try:
        trainer.train()
        metrics = trainer.evaluate()
    finally:
        trainer.close()
    logged = [entry for entry in trainer.state.log_history if "rollout/return" in entry]
    assert len(logged) == 1
    shares = [metrics[f"eval_in_a_row/{position}"] for position in range(1, 6)]
    assert sum(shares) == pytest.approx(metrics["eval_average_length"])
    assert metrics["eval_average_length"] == metrics["eval_return"]
    assert shares[4] == metrics["eval_success_rate"] == metrics["eval_success_rate/abc_d"]


@pytest.fixture
def real(monkeypatch):
    """The real checkout and interpreter, as the environment names them."""
    for name in ("PI_RL_CALVIN_ROOT", "PI_RL_CALVIN_PYTHON"):
        value = REAL.get(name)
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(calvin_install, "REQUIRED_MODULES", REQUIRED_MODULES)


REAL = {name: os.environ.get(name) for name in ("PI_RL_CALVIN_ROOT", "PI_RL_CALVIN_PYTHON")}
REQUIRED_MODULES = calvin_install.REQUIRED_MODULES


@pytest.mark.calvin
def test_a_real_checkout(real):
    """One episode each in D and in a training scene, twice: pictures, sentences, determinism."""
    sequences = sequences_of(None)
    drawn = [(sequences.episode(state, "D").condition, subtasks(state)) for state in range(1000)]
    assert digest_of(drawn) == PUBLISHED_DIGEST
    with make_env("calvin:abc_d", 1) as env:
        for state in (0, TRAIN_STATE_OFFSET):
            runs = []
            for _ in range(2):
                first = env.reset(ids(state))
                assert first[STATIC_CAMERA].shape == (1, 200, 200, 3)
                assert first[GRIPPER_CAMERA].shape == (1, 84, 84, 3)
                assert first[STATIC_CAMERA].std() > 10
                result = env.step_chunk(chunk([0.5, 0.5, -0.5, 0, 0, 0, -1], 30))
                runs.append((first[STATIC_CAMERA], result.observation[STATIC_CAMERA], result.observation[STATE]))
            for one, other in zip(*runs, strict=True):
                np.testing.assert_array_equal(one, other)
            assert np.abs(runs[0][2][0, :3]).max() < 1.5


@pytest.mark.calvin
def test_the_stand_in_under_the_interpreter_that_has_pybullet(calvin, monkeypatch):
    monkeypatch.setattr(calvin_install, "REQUIRED_MODULES", REQUIRED_MODULES)
    python = REAL["PI_RL_CALVIN_PYTHON"] or f"{REAL['PI_RL_CALVIN_ROOT']}/.venv/bin/python"
    env = calvin(python=python)
    assert sum(result.rewards.sum() for result in play(env, 3)) == 5
