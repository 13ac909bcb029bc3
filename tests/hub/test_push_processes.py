"""Pushes of a run of two processes: the first pushes, once; a Hub that refuses stops neither of them."""

import re
import sys
from pathlib import Path

import pytest

from tests.hub.hub_client import run_client

ROOT = Path(__file__).parents[2]
REPO = "user/policy"
SCRIPT = """
import os, sys
import torch
from pi_rl import FlowPPOConfig, FlowPPOTrainer
torch.set_num_threads(1)
policy, out, repo = sys.argv[1:]
args = FlowPPOConfig(output_dir=out, use_cpu=True, num_iterations=2, num_envs=4, rollout_chunks=2, update_epochs=1,
                     per_device_train_batch_size=4, critic_hidden_sizes=[8], env_workers=1, eval_episodes=0,
                     save_every_iterations=1, disable_tqdm=True, push_to_hub=True, hub_model_id=repo,
                     hub_always_push=True)
trainer = FlowPPOTrainer(policy, args, "toy:point-mass")
trainer.train()
trainer.push_to_hub()
trainer.close()
torch.distributed.destroy_process_group()
print(f"rank {os.environ['RANK']} ended after step {trainer.state.global_step}", flush=True)
"""
PUSHES = ["Training in progress, step 1", "Training in progress, step 2", "End of training"]


@pytest.fixture
def train(hub, mlp_folder, tmp_path):
    """Trains two processes as `accelerate launch` does; gives the finished launcher."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    layout = ROOT / "recipes" / "accelerate" / "cpu_ddp.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", layout]

    def run():
        done = run_client(
            hub, tmp_path / "hf", "env", "ACCELERATE_USE_CPU=true", *launch, script, mlp_folder, tmp_path / "run", REPO
        )
        assert done.returncode == 0, done.stderr[-4000:]
        for rank in range(2):
            assert f"rank {rank} ended after step 2" in done.stdout
        return done

    return run


@pytest.mark.slow
def test_the_first_process_alone_pushes(hub, train, tmp_path):
    done = train()
    repo = hub.repos[REPO]
    assert repo.messages == ["initial commit", *PUSHES]
    assert done.stdout.count("On the Hub:") == 1
    assert "pushes to the Hub failed" not in done.stderr
    weights = tmp_path / "run" / "policy" / "model.safetensors"
    assert repo.files()["model.safetensors"] == weights.read_bytes()


@pytest.mark.slow
def test_a_hub_that_refuses_stops_neither_process(hub, train, tmp_path):
    hub.fail("/commit/", 403, times=10_000)
    done = train()
    assert hub.repos[REPO].messages == ["initial commit"]
    reports = [line for line in done.stderr.splitlines() if "pushes to the Hub failed" in line]
    counts = [re.search(r"(\d+) of (\d+) pushes", report).groups() for report in reports]  # at the end, and in close()
    assert sum(int(failed) for failed, _ in counts) == len(PUSHES)
    assert all(failed == pushed for failed, pushed in counts)
    assert f"pi-rl push {tmp_path / 'run' / 'policy'} --repo {REPO}" in reports[-1]
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
