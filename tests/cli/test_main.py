"""The command line as a user types it: help, mistakes, exit codes, JSON."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from pi_rl.__about__ import __version__
from pi_rl.cli import env as env_command
from pi_rl.cli.main import COMMANDS, main
from pi_rl.recipe_configs import CONFIGS, algorithm_of, config_names, find_config

OPTIONS = {
    "demo": ("--full", "--output_dir"),
    "train": ("--config", "--resume", "--algorithm", "--noise", "--eval_videos", "--num_envs", "--list"),
    "sft": ("--config", "--resume", "--dataset", "--steps", "--list"),
    "eval": ("--policy", "--env", "--videos", "--json"),
    "plan": ("--config", "--num_gpus", "--json"),
    "assets": ("--dir", "--yes", "--json"),
    "env": ("--json",),
}


def toy_words(policy, folder):
    """A run that takes a second or two: two numbers of action, no pictures."""
    return ["--model", str(policy), "--env", "toy:point-mass", "--env_options", '{"max_episode_steps": 8}',
            "--output_dir", str(folder), "--no_video", "--use_cpu", "--num_envs", "4", "--rollout_chunks", "4",
            "--per_device_train_batch_size", "16", "--update_epochs", "1", "--eval_episodes", "4",
            "--critic_hidden_sizes", "16", "--save_every_iterations", "1"]  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_the_options_and_shows_examples(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: pi-rl {command}")
    for option in OPTIONS[command]:
        assert option in text
    assert f"examples:\n  pi-rl {command}" in text
    assert main(["help", command]) == 0
    assert capsys.readouterr().out == text


def test_without_a_command_the_commands_are_listed(capsys):
    for words in ([], ["--help"], ["help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["trian"], ["no command 'trian'", "train"]),
        (["eval", "--polcy", "x", "--env", "y", "--policy", "z"], ["--polcy", "nearest: --policy"]),
        (["env", "--jsno"], ["--jsno is not an option of pi-rl env", "--json"]),
        (["train", "--config", "quickstart", "--nois", "flow_sde"], ["--nois", "--noise"]),
        (["train", "--config", "quickstrat"], ["quickstrat", "metaworld/quickstart"]),
        (["train", "--config", "quickstart", "--num-envs", "7"], ["samples per process", "do not divide"]),
        (["train", "--config", "quickstart", "--algorithm", "dpo"], ["'dpo'", "ppo"]),
        (["train"], ["--config FILE|NAME", "--resume DIR"]),
        (["train", "--resume", "nowhere"], ["nowhere", "no run to go on with"]),
        (["train", "--resume", "nowhere", "--config", "quickstart"], ["leave --config out"]),
        (["sft"], ["--config FILE|NAME"]),
        (["sft", "--config", "pi05_libero_40", "--stpes", "3"], ["--stpes", "--steps"]),
        (["sft", "--config", "pi05_libero_4"], ["sft/pi05_libero_40"]),
        (["sft", "--resume", "nowhere"], ["no run to go on with"]),
        (["demo", "--fulll"], ["--fulll"]),
    ],
)
def test_mistakes_end_with_one_message_and_exit_code_2(words, messages, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert err.strip().startswith("error: ")
    for message in messages:
        assert message in err
    assert out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt("the same command continues."), 130, "interrupted: the same command continues."),
        (SystemExit(75), 75, ""),
        (ZeroDivisionError("a mistake of ours"), 1, "Traceback"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_exit_codes(error, code, message, monkeypatch, capfd):
    def fail():
        raise error

    monkeypatch.setattr(env_command, "describe", fail)
    assert main(["env"]) == code
    assert message in capfd.readouterr().err


def test_the_module_is_the_command_and_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "pi_rl"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"pi_rl {__version__}\n"
    reader, writer = os.pipe()
    os.close(reader)
    listed = subprocess.run([*command, "train", "--list"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (listed.returncode, listed.stderr) == (1, "")


def test_recipes_are_found_by_name(tmp_path):
    names = config_names()
    assert {"metaworld/quickstart", "metaworld/demo", "libero/pi0_long_flow_sde"} <= set(names)
    assert not {"metaworld/base", "libero/pi0", "sft/pi05_libero_40"} & set(names)
    assert "sft/pi05_libero_40" in config_names(sft=True)
    for given in ("quickstart", "metaworld/quickstart", "metaworld/quickstart.yaml"):
        assert find_config(given) == CONFIGS / "metaworld/quickstart.yaml"
    for name in names:
        assert algorithm_of(find_config(name)) == ("grpo" if "grpo" in name else "ppo"), name
    own = tmp_path / "quickstart"
    own.write_text("base: other.yaml\n")
    (tmp_path / "other.yaml").write_text("group_size: 4\n")
    assert find_config(str(own)) == own
    assert algorithm_of(own) == "grpo"


def test_env_says_what_a_report_needs(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:secret@hub.example")
    renderers = env_command._renderers()
    assert {"egl", "osmesa"} <= set(renderers)
    monkeypatch.setattr(env_command, "_renderers", lambda: {"egl": renderers["egl"]})  # the others take longer
    assert main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["pi_rl"]["version"] == __version__
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if head.returncode == 0:
        assert head.stdout.startswith(found["pi_rl"]["commit"].split()[0])
    assert found["machine"]["cores"]["available"] == len(os.sched_getaffinity(0))
    assert found["torch"]["version"].split("+")[0] == found["packages"]["torch"]
    assert found["renderers"] == {"egl": "draws"}
    assert (found["hugging face"]["logged in"], found["hugging face"]["HF_ENDPOINT set"]) == (True, True)
    assert "hf_abc" not in text
    assert "secret" not in text
    shown = env_command.as_text(found)
    assert shown.startswith("```text\npi_rl\n")
    assert shown.endswith("\n```")
    assert f"mujoco {found['simulators']['MetaWorld']['mujoco']}" in shown


@pytest.mark.parametrize(
    ("place", "shown"), [("scratch/alice/hub", "outside the home folder"), ("home/alice/hub", "~/hub")]
)
def test_env_shows_no_user_names(capsys, monkeypatch, tmp_path, place, shown):
    (tmp_path / "home" / "alice").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "alice"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / place))
    library = tmp_path / "home" / "alice" / "conda" / "lib.so"
    monkeypatch.setattr(env_command, "_renderers", lambda: {"egl": lambda *_: f"ImportError: {library}: not found"})
    assert main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["hugging face"]["cache"] == shown
    assert found["renderers"]["egl"].startswith("does not draw: ImportError: ")
    assert "lib.so: not found" in found["renderers"]["egl"]
    assert "alice" not in text


def test_a_renderer_that_does_not_draw_says_why(monkeypatch):
    from pi_rl.envs.renderer import probe_renderer

    assert "no frame within" in probe_renderer("egl", timeout_s=0.01)
    monkeypatch.setattr(env_command, "_renderers", lambda: {"egl": lambda *_: "no driver"})
    assert env_command.describe()["renderers"] == {"egl": "does not draw: no driver"}


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_train_runs_a_recipe_and_refuses_to_repeat_it(algorithm, mlp_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "mine.yaml"
    own = {"ppo": "seed: 5\n", "grpo": "seed: 5\ngroup_size: 2\nfilter_groups: false\n"}[algorithm]
    config.write_text(own + "num_iterations: 1\n")
    words = toy_words(mlp_folder, "run")
    if algorithm == "grpo":
        critic = words.index("--critic_hidden_sizes")
        words = words[:critic] + words[critic + 2 :]
    assert main(["train", "--config", "mine.yaml", *words]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["config"]["algorithm"].lower(), results["seed"]) == (algorithm, 5)
    assert results["noise"] == {"ppo": "flow_noise", "grpo": "flow_sde"}[algorithm]
    card = (tmp_path / "run" / "policy" / "README.md").read_text()
    assert "pi-rl train --config mine.yaml" in card
    assert str(tmp_path) not in card
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 2
    assert "holds a finished run" in capsys.readouterr().err


@pytest.mark.slow  # three processes that load torch
def test_a_killed_run_goes_on_in_a_folder_that_was_moved(mlp_folder, tmp_path):
    command = [sys.executable, "-m", "pi_rl", "train"]
    words = toy_words(mlp_folder, tmp_path / "run")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.Popen([*command, *words, "--num_iterations", "60"], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "run").glob("checkpoint-*/trainer_state.json")):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    (tmp_path / "run").rename(moved)
    other = [*command, "--resume", "renamed", "--num_iterations", "3"]
    refused = subprocess.run(other, cwd=moved.parent, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "other settings" in refused.stderr
    again = subprocess.run(
        [*command, "--resume", "renamed"], cwd=moved.parent, env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert (moved / "results.json").is_file()
    history = json.loads((moved / "trainer_state.json").read_text())["log_history"]
    iterations = [entry["iteration"] for entry in history if "iteration" in entry]
    assert iterations == list(range(1, 61))


@pytest.mark.slow  # three processes that load torch
def test_two_processes_print_once(mlp_folder, tmp_path):
    layout = Path(__file__).parents[2] / "recipes/accelerate/cpu_ddp.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(layout)]
    words = [*toy_words(mlp_folder, "run"), "--per_device_train_batch_size", "8", "--num_iterations", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*launcher, "-m", "pi_rl", "train", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for once in ("2 process(es)", "iteration 1/2", "iteration 2/2", "Policy, card, curve and video"):
        assert done.stdout.count(once) == 1, once
    card = (tmp_path / "run" / "policy" / "README.md").read_text()
    assert "accelerate launch -m pi_rl train" in card
