"""`pi-rl eval` in MetaWorld: films, a real kill, any number of workers and environments, a policy from a Hub."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import pi_rl.rollout.evaluator as evaluator
from pi_rl.cli.main import main
from tests.cli.servers import COMMIT, Contents, serve

ENV = "metaworld:handle-press-v3,button-press-topdown-v3"
OPTIONS = ["image_size=32", "fast_rendering=true", "hide_arm=true", "max_episode_steps=30"]


def command(policy, folder, *words):
    given = ["--policy", policy, "--env", ENV, "--env_options", *OPTIONS, "--output_dir", folder, "--device", "cpu"]
    return ["eval", *map(str, [*given, *words])]


def read(folder):
    return json.loads((folder / "eval.json").read_text())


@pytest.mark.slow
def test_films_show_what_was_evaluated(small_pi0_folder, tmp_path, capsys, monkeypatch):
    import av

    words = command(small_pi0_folder, tmp_path / "a", "--states", "3", "--tasks", "1", "--videos", "1_success")
    assert main(words) == 0
    assert read(tmp_path / "a")["videos"] == []
    record = evaluator.record_episode
    monkeypatch.setattr(evaluator, "record_episode", lambda *given, **named: (record(*given, **named)[0], True))
    words[-1] = "1_failure"
    assert main(words) == 1  # the evaluation stands, the film that contradicts it is not written
    assert "not deterministic" in capsys.readouterr().err
    assert not (tmp_path / "a/videos").exists()
    monkeypatch.setattr(evaluator, "record_episode", record)
    assert main(words) == 0
    report = read(tmp_path / "a")
    assert report["videos"] == ["videos/button-press-topdown-v3_state3_failure.mp4"]
    with av.open(str(tmp_path / "a" / report["videos"][0])) as film:
        stream = film.streams.video[0]
        assert (stream.frames, stream.width, stream.average_rate) == (31, 256, 80)


def acted(monkeypatch, folder, policy, *words):
    """Every action that any episode was given, by task and state: to the bit."""
    spoken: dict[str, list[bytes]] = {}
    actions = evaluator.ode_actions

    def spy(model, io, observation, rows, reset_ids, chunk, *given, **named):
        result = actions(model, io, observation, rows, reset_ids, chunk, *given, **named)
        if named.get("batch_size") is not None:  # the outer call, not one of its padded parts
            for (task, state), number, values in zip(reset_ids.tolist(), chunk.tolist(), result, strict=True):
                spoken.setdefault(f"{task} {state} {number}", []).append(values.tobytes())
        return result

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "ode_actions", spy)
        assert main(command(policy, folder, *words)) == 0
    return spoken


@pytest.mark.slow
def test_workers_and_environments_change_no_bit(small_pi0_folder, tmp_path, monkeypatch):
    options = "--episodes", 12
    first = acted(monkeypatch, tmp_path / "a", small_pi0_folder, *options, "--num_envs", 8, "--env_workers", 2)
    assert len(first) == 12 * 6
    for name, num_envs, workers in (("b", 3, 1), ("c", 8, 1), ("d", 1, 1)):
        words = *options, "--num_envs", num_envs, "--env_workers", workers
        assert acted(monkeypatch, tmp_path / name, small_pi0_folder, *words) == first
        assert read(tmp_path / name)["episodes"] == read(tmp_path / "a")["episodes"]


@pytest.mark.slow
def test_batches_of_another_size_round_otherwise(small_pi0_folder, tmp_path, monkeypatch):
    """Why `--batch_size` is one of the settings: the actions agree, their last bits do not."""
    options = "--episodes", 4, "--num_envs", 4
    first = acted(monkeypatch, tmp_path / "a", small_pi0_folder, *options)
    alone = acted(monkeypatch, tmp_path / "b", small_pi0_folder, *options, "--batch_size", 1)
    assert first != alone
    beginnings = [key for key in first if key.endswith(" 0")]
    for key in beginnings:
        np.testing.assert_allclose(np.frombuffer(first[key][0]), np.frombuffer(alone[key][0]), atol=1e-5)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_as_if_nothing_had_happened(small_pi0_folder, tmp_path):
    """`kill -9` in the middle, then the same command with other environments: equal to an uninterrupted run."""
    assert main(command(small_pi0_folder, tmp_path / "whole", "--episodes", 24)) == 0
    words = command(small_pi0_folder, tmp_path / "parts", "--episodes", 24, "--num_envs", 2)
    process = subprocess.Popen([sys.executable, "-m", "pi_rl", *words], stdout=subprocess.DEVNULL)
    noted = tmp_path / "parts/episodes.jsonl"
    deadline = time.monotonic() + 240
    while not (noted.exists() and noted.read_bytes().count(b"\n") >= 5):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = noted.read_bytes().count(b"\n")
    assert 5 <= done < 24
    assert main([*words[:-1], "5"]) == 0
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert parts["timing"]["episodes"] == 24 - done
    for part in ("episodes", "summary", "settings"):
        assert parts[part] == whole[part]


@pytest.mark.slow
def test_a_policy_from_the_hub_is_named_with_its_commit(small_pi0_folder, tmp_path):
    files = {path.name: path.read_bytes() for path in small_pi0_folder.iterdir() if path.is_file()}
    contents = Contents(repos={"models/somebody/pi0": files})
    with serve(contents) as url:
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache")}

        def run(policy, folder):
            words = command(policy, tmp_path / folder, "--episodes", 2, "--json")
            return subprocess.run(
                [sys.executable, "-m", "pi_rl", *words], env=environment, capture_output=True, text=True, check=False
            )

        done = run("somebody/pi0", "a")
        missing = run("somebody/nothing", "b")
    assert done.returncode == 0, done.stderr
    policy = json.loads(done.stdout)["policy"]
    assert (policy["id"], policy["revision"]) == ("somebody/pi0", COMMIT)
    weights = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert len(policy["sha256"]) == len(weights)
    assert missing.returncode == 2
    assert "somebody/nothing" in missing.stderr
    assert "Traceback" not in missing.stderr
