"""`pi-rl eval` on a toy task: what it writes, how it goes on, and what it says when something is wrong."""

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import pi_rl.rollout.evaluator as evaluator
from pi_rl.cli.eval_plan import choose_states, choose_tasks, find_policy, plan_episodes
from pi_rl.cli.eval_report import choose_videos, evaluation_table, parse_videos, video_name
from pi_rl.cli.main import main
from pi_rl.cli.parser import UserError, parse_mapping
from pi_rl.envs.registry import check_name_and_options
from pi_rl.rollout.episode_log import EpisodeLog
from pi_rl.rollout.evaluator import EpisodeResults
from pi_rl.rollout.summary import summarize_episodes

OPTIONS = ["tolerance=0.29", "reward=distance", "max_episode_steps=12"]


@pytest.fixture
def evaluate(mlp_folder, tmp_path, monkeypatch):
    """Runs `pi-rl eval` on the toy task in this process and returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def evaluate(folder, *words, policy=mlp_folder, env="toy:point-mass", options=OPTIONS):
        given = ["--policy", str(policy), "--env", env, "--output_dir", str(tmp_path / folder), "--device", "cpu"]
        return main(["eval", *given, *(["--env_options", *options] if options else []), *map(str, words)])

    return evaluate


def read(folder):
    return json.loads((folder / "eval.json").read_text())


def lines(folder):
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def test_a_table_a_json_file_and_a_line_per_episode(evaluate, tmp_path, capsys, mlp_folder):
    assert evaluate("a", "--seed", 3) == 0
    out = capsys.readouterr().out
    assert "the first 10 of 10,000 evaluation states of each of 1 task(s)" in out
    assert "--episodes N" in out
    report = read(tmp_path / "a")
    rate, low, high = report["summary"]["success_rate"], *report["summary"]["ci95"]
    assert f"{rate:.3f} [{low:.2f}, {high:.2f}]" in out
    assert "environment steps in" in out
    assert [episode["state_id"] for episode in report["episodes"]] == list(range(10))
    first = report["episodes"][0]
    assert set(first) == {
        "task", "task_index", "instruction", "state_id", "success", "length", "return", "seed", "failed",
    }  # fmt: skip
    assert (first["task"], first["seed"], first["failed"]) == ("point-mass", 3, False)
    assert {episode["success"] for episode in report["episodes"]} == {True, False}
    assert sorted(lines(tmp_path / "a"), key=lambda episode: episode["state_id"]) == report["episodes"]
    assert report["policy"]["id"] == "/".join(mlp_folder.parts[-2:])
    assert report["settings"]["env_options"] == {"tolerance": 0.29, "reward": "distance", "max_episode_steps": 12}
    assert report["settings"]["versions"]["torch"].startswith("2.11")
    assert report["command"].startswith("pi-rl eval --policy ")
    assert str(tmp_path) not in report["command"]
    assert report["timing"]["env_steps"] == sum(episode["length"] for episode in report["episodes"])


def test_json_is_all_that_is_on_standard_output(evaluate, tmp_path, capsys):
    assert evaluate("a", "--json", "--episodes", 2) == 0
    assert json.loads(capsys.readouterr().out) == read(tmp_path / "a")


@pytest.mark.parametrize("num_envs", [1, 3, 10])
def test_the_number_of_environments_changes_no_bit(evaluate, tmp_path, num_envs):
    assert evaluate("a", "--num_envs", 8) == 0
    assert evaluate("b", "--num_envs", num_envs) == 0
    first, second = read(tmp_path / "a"), read(tmp_path / "b")
    for part in ("episodes", "summary", "settings"):
        assert first[part] == second[part]


def test_an_interrupted_evaluation_goes_on(evaluate, tmp_path, capsys, monkeypatch):
    assert evaluate("whole") == 0
    add = EpisodeLog.add

    def interrupted(self, results, index):
        if len(self.episodes) == 3:
            raise KeyboardInterrupt
        add(self, results, index)

    monkeypatch.setattr(EpisodeLog, "add", interrupted)
    capsys.readouterr()
    assert evaluate("parts") == 130
    assert "3 of 10 episodes are in" in capsys.readouterr().err
    assert not (tmp_path / "parts/eval.json").exists()
    with (tmp_path / "parts/episodes.jsonl").open("a") as file:
        file.write('{"task": "point-mass", "task_in')  # as a kill in the middle of a write leaves it
    monkeypatch.setattr(EpisodeLog, "add", add)
    assert evaluate("parts", "--num_envs", 2) == 0
    assert "Continuing: 3 episodes" in capsys.readouterr().out
    assert len(lines(tmp_path / "parts")) == 10
    assert read(tmp_path / "parts")["episodes"] == read(tmp_path / "whole")["episodes"]
    assert read(tmp_path / "parts")["summary"] == read(tmp_path / "whole")["summary"]


def test_a_finished_evaluation_is_shown_again_without_the_policy(evaluate, tmp_path, capsys, monkeypatch):
    assert evaluate("a") == 0
    before = read(tmp_path / "a")
    monkeypatch.setattr("pi_rl.policies.checkpoints.load_policy", None)
    capsys.readouterr()
    assert evaluate("a") == 0
    out = capsys.readouterr().out
    assert "All episodes were run before" in out
    assert "success [95 %]" in out
    assert read(tmp_path / "a") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", 1], "seed was 0, now 1"),
        (["--env_options", "tolerance=0.28", *OPTIONS[1:]], "env_options.tolerance was 0.29, now 0.28"),
        (["--episodes", 20], 'states was "0-9", now "0-19"'),
        (["--n_action_steps", 1], "n_action_steps was 2, now 1"),
        (["--denoising_steps", 2], "denoising_steps was 4, now 2"),
        (["--batch_size", 4], "batch_size was 8, now 4"),
    ],
)
def test_other_settings_are_refused(evaluate, tmp_path, capsys, words, message):
    assert evaluate("a") == 0
    before = (tmp_path / "a/episodes.jsonl").read_bytes()
    assert evaluate("a", *words, options=None if "--env_options" in words else OPTIONS) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "a/episodes.jsonl").read_bytes() == before


def test_episodes_shorter_than_a_chunk_are_refused(evaluate, capsys):
    assert evaluate("a", options=["max_episode_steps=1"]) == 2
    assert "executes 2 steps of a chunk, but episodes of toy:point-mass end after 1" in capsys.readouterr().err


def test_another_policy_in_the_same_place_is_refused(evaluate, tmp_path, capsys, mlp_folder):
    policy = shutil.copytree(mlp_folder, tmp_path / "policy")
    assert evaluate("a", policy=policy) == 0
    weights = bytearray((policy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (policy / "model.safetensors").write_bytes(weights)
    assert evaluate("a", policy=policy) == 2
    assert "policy_sha256 was" in capsys.readouterr().err


def test_folders_of_others_are_left_alone(evaluate, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    assert evaluate("mine") == 2
    assert "is not empty and holds no evaluation" in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert evaluate("a") == 0
    with (tmp_path / "a/episodes.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert evaluate("a") == 2
    assert "another process" in capsys.readouterr().err
    text = (tmp_path / "a/episodes.jsonl").read_text()
    (tmp_path / "a/episodes.jsonl").write_text("nonsense\n" + text)
    assert evaluate("a") == 2
    assert "line 1 of" in capsys.readouterr().err


def test_the_settings_are_complete_or_absent(evaluate, tmp_path, monkeypatch):
    """A kill between opening the folder and writing the settings leaves a folder that can be used."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/episodes.jsonl").touch()
    assert evaluate("a") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "toy:point-mas"}, "nearest: point-mass"),
        ({"env": "metaworld:reech-v3"}, "nearest: reach-v3"),
        ({"env": "metaworl:reach-v3"}, "metaworld"),
        ({"options": ["tolerence=1"]}, "nearest: tolerance"),
        ({"options": ["tolerance"]}, "key=value"),
        ({"options": ["{tolerance: [}"]}, "not valid JSON or YAML"),
        ({"words": ["--tasks", "point-mas"]}, "nearest: point-mass"),
        ({"words": ["--tasks", "1"]}, "an index from 0 to 0"),
        ({"words": ["--states", "9999-10000"]}, "0 to 9999"),
        ({"words": ["--states", "a"]}, "such as 0-4,7"),
        ({"words": ["--episodes", "10001"]}, "10000"),
        ({"words": ["--episodes", "0"]}, "whole number from 1 up"),
        ({"words": ["--episodes", "2", "--states", "0"]}, "not allowed with"),
        ({"words": ["--n_action_step", "2"]}, "nearest: --n_action_steps"),
        ({"words": ["--n_action_steps", "3"]}, "chunk_size=2"),
        ({"words": ["--videos", "2_success"]}, "has no pictures"),
        ({"words": ["--videos", "success"]}, "2_success or 3_failure"),
        ({"words": ["--device", "cuda:0"]}, "no CUDA device"),
        ({"words": ["--device", "gpu"]}, "gpu"),
        ({"policy": "./nowhere"}, "neither an existing folder nor a Hub id"),
        ({"env": "metaworld:reach-v3", "options": []}, "state"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(evaluate, tmp_path, capsys, changes, message):
    assert evaluate("a", *changes.pop("words", []), **changes) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("error:") == 1
    assert "Traceback" not in captured.err
    assert not (tmp_path / "a/eval.json").exists()


def test_required_options_and_commands(capsys):
    assert main(["eval", "--env", "toy:point-mass"]) == 2
    assert "--policy" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "nearest: eval" in capsys.readouterr().err
    assert main(["eval", "--policy", "x", "--env", "toy:point-mass", "stray"]) == 2
    assert "'stray' belongs to no option" in capsys.readouterr().err


def test_a_failure_of_ours_has_a_traceback_and_exit_code_1(evaluate, capsys, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(evaluator, "evaluate_policy", broken)
    assert evaluate("a") == 1
    assert "ZeroDivisionError: inside" in capsys.readouterr().err


def test_a_simulators_missing_files_are_the_users_to_put_right(evaluate, capsys, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("LIBERO's assets are missing. Run `pi-rl assets libero`.")

    monkeypatch.setattr(evaluator, "evaluate_policy", missing)
    assert evaluate("a") == 2
    assert "pi-rl assets libero" in capsys.readouterr().err


def test_help_is_quick_and_names_everything():
    """Without torch, LeRobot or a simulator."""
    code = (
        "import sys; from pi_rl.cli.main import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'lerobot', 'transformers', 'mujoco'} & set(sys.modules); assert not heavy, heavy; "
        "sys.exit(code)"
    )
    for words in (["--help"], ["--version"], ["eval", "--help"], ["assets"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert main(["eval", "--env", "toy:point-mass", "--policy", "x", "--help"]) == 0


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "pi_rl", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pi_rl 0.")


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_tasks_by_name_and_index():
    spec = check_name_and_options("metaworld:reach-v3,push-v3,door-open-v3", {})
    assert choose_tasks(spec, []) == [0, 1, 2]
    assert choose_tasks(spec, ["door-open-v3,0"]) == [0, 2]
    with pytest.raises(ValueError, match="named twice"):
        choose_tasks(spec, ["0", "reach-v3"])
    with pytest.raises(ValueError, match="nearest: push-v3"):
        choose_tasks(spec, ["pusch-v3"])


def test_states_as_ranges():
    spec = dataclasses.replace(check_name_and_options("toy:point-mass", {}), eval_states=50)
    assert choose_states(spec, "0-2,49") == [0, 1, 2, 49]
    for text, message in (("50", "0 to 49"), ("3-1", "does not exist"), ("1,1", "twice"), ("1,", "such as")):
        with pytest.raises(ValueError, match=message):
            choose_states(spec, text)


def test_all_states_where_there_are_few():
    spec = check_name_and_options("metaworld:reach-v3,push-v3,door-open-v3", {})
    libero = dataclasses.replace(spec, eval_states=50)
    ids, which = plan_episodes(libero, [0, 1, 2], None, None)
    assert len(ids) == len({tuple(row) for row in ids.tolist()}) == 150
    assert which == "all 50 evaluation states of each of 3 task(s)"
    ids, which = plan_episodes(spec, [0, 2], None, None)
    assert ids.tolist() == [[task, state] for state in range(10) for task in (0, 2)]
    calvin = dataclasses.replace(spec, tasks=("abc_d",), eval_states=1000)
    assert len(plan_episodes(calvin, [0], None, None)[0]) == 1000
    with pytest.raises(ValueError, match="shared equally"):
        plan_episodes(spec, [0, 2], 5, None)


def test_a_training_runs_folder_stands_for_its_policy(tmp_path, mlp_folder):
    def put(name):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")

    put("sft")
    assert find_policy(str(tmp_path), None) == tmp_path / "sft"
    put("checkpoint-9")
    put("checkpoint-10")
    assert find_policy(str(tmp_path), None) == tmp_path / "checkpoint-10"
    put("policy")
    assert find_policy(str(tmp_path), None) == tmp_path / "policy"
    assert find_policy(str(tmp_path / "checkpoint-9"), None) == tmp_path / "checkpoint-9"
    put("other/checkpoints/last/pretrained_model")
    assert find_policy(str(tmp_path / "other"), None).name == "pretrained_model"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no policy"):
        find_policy(str(tmp_path / "empty"), None)


def test_options_as_pairs_or_mapping():
    assert parse_mapping(["a=1", "b=[1, 2.5]", "c=x", "d=1e-3"], "--o") == {"a": 1, "b": [1, 2.5], "c": "x", "d": 1e-3}
    assert parse_mapping(['{"a": 1, "b": {"c": true}}'], "--o") == {"a": 1, "b": {"c": True}}
    for words, message in ((["a=1", "a=2"], "twice"), (["{1: 2}"], "map names"), (["=1"], "key=value")):
        with pytest.raises(UserError, match=message):
            parse_mapping(words, "--o")


def test_videos_are_the_first_of_each_outcome():
    assert parse_videos(["2_success,3_failure"]) == parse_videos(["2_successes", "3_failures"])
    rows = [
        {"task": "put it / there", "state_id": state, "success": state % 2 == 0, "failed": state == 1}
        for state in range(8)
    ]
    chosen = choose_videos(rows, {"success": 2, "failure": 1})
    assert [row["state_id"] for row in chosen] == [0, 2, 3]
    assert video_name(chosen[2]) == "put-it-there_state3_failure.mp4"


def test_the_table_has_both_averages_and_how_far_sequences_got():
    names = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    success = [True] * 4 + [False] * 8
    summary = summarize_episodes(names, success, [5] * 12, [0.0] * 12, {"easy": ["a"], "hard": ["b", "c"]})
    rows = {line.split("  ")[0]: line for line in evaluation_table(summary).splitlines()}
    assert "0.333" in rows["all"]
    assert "0.500" in rows["mean of groups"]
    assert "1.000" in rows["easy"]
    assert {"a", "b", "c"} <= set(rows)
    calvin = summarize_episodes(["abc_d"] * 4, [True, False, False, False], [5] * 4, [5, 3, 1, 0], None, 5)
    text = evaluation_table(calvin, failed=1)
    assert "solved of 5  2.250" in text
    assert "0.750 / 0.500 / 0.500 / 0.250 / 0.250" in text
    assert "1 episode(s) count as unsolved" in text


def test_episodes_of_several_instructions_are_noted_with_all_of_them(tmp_path):
    spec = dataclasses.replace(
        check_name_and_options("toy:point-mass", {}),
        subtasks=2,
        instruction_of=lambda task, state, solved: f"step {solved} of {state}",
    )
    ids = np.array([[0, 7]], np.int64)
    with EpisodeLog(tmp_path / "x", {}, spec, ids, seed=0) as log:
        log.add(EpisodeResults.empty(spec, ids), 0)
    assert lines(tmp_path / "x")[0]["instruction"] == "step 0 of 7; then step 1 of 7"
    assert os.listdir(tmp_path / "x")
