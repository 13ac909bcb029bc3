"""The recipes as a user starts them, with a Hub that works and with one that refuses everything."""

import json
import sys
from pathlib import Path

import pytest

from tests.hub.hub_client import run_client

ROOT = Path(__file__).parents[2]
REPO = "user/trained"
ENV = '{"image_size": 32, "fast_rendering": true, "hide_arm": true, "max_episode_steps": 15}'
SMALL = ["--env", "metaworld:handle-press-v3", "--env_options", ENV, "--num_envs", "4", "--env_workers", "1",
         "--critic_hidden_sizes", "16", "--use_cpu", "true", "--rollout_chunks", "4", "--update_epochs", "1",
         "--per_device_train_batch_size", "16", "--num_iterations", "2", "--noise_std_min", "0.4", "--noise_std_max",
         "1.0", "--eval_episodes", "2", "--gradient_accumulation_steps", "1", "--save_every_iterations", "1",
         "--push_to_hub", "--hub_model_id", REPO]  # fmt: skip


@pytest.fixture
def recipe(hub, small_pi0_folder, tmp_path):
    """Runs `recipes/ppo_flow_noise.py` in a process of its own; gives its output folder and the finished process."""

    def run(*words):
        script, folder = ROOT / "recipes" / "ppo_flow_noise.py", tmp_path / "run"
        words = ["--model", small_pi0_folder, "--output_dir", folder, *SMALL, *words]
        return folder, run_client(hub, tmp_path / "hf", sys.executable, script, *words, cwd=ROOT, timeout=1800)

    return run


@pytest.mark.slow
def test_a_run_ends_on_the_hub_with_card_results_curve_and_film(hub, recipe):
    folder, done = recipe("--hub_always_push", "--hub_token", hub.write_token)
    assert done.returncode == 0, done.stderr[-4000:]
    messages = hub.repos[REPO].messages
    assert [text.partition(",")[0] for text in messages[1:]] == ["Training in progress"] * 2 + ["End of training"]
    held = hub.repos[REPO].files()
    for name in ("results.json", "learning_curve.png", "before_after.mp4", "pi_rl_config.yaml", "model.safetensors"):
        assert name in held
    assert json.loads(held["results.json"])["rl"]["n_episodes"] == 2
    card = held["README.md"].decode()
    assert "success" in card
    assert f"{hub.address}/{REPO} (" in done.stdout
    said = (
        done.stdout + done.stderr + (folder / "pi_rl_config.yaml").read_text() + (folder / "results.json").read_text()
    )
    for text in (said, *(content.decode(errors="replace") for content in held.values())):
        assert hub.write_token not in text


@pytest.mark.slow
def test_a_hub_that_refuses_everything_leaves_a_finished_run(hub, recipe):
    hub.fail("", 403, times=100_000)
    folder, done = recipe()
    assert done.returncode == 0, done.stderr[-4000:]
    assert "could not be prepared" in done.stderr
    report = [line for line in done.stderr.splitlines() if "pushes to the Hub failed" in line]
    assert len(report) == 2  # after the training, and after the push of the result
    assert f"pi-rl push {folder / 'checkpoint-2'} --repo {REPO}" in report[0]
    assert f"pi-rl push {folder} --repo {REPO}" in report[1]
    for name in ("checkpoint-1", "checkpoint-2", "policy"):
        assert (folder / name / "model.safetensors").is_file()
    assert (folder / "results.json").is_file()
