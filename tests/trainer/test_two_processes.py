"""`accelerate launch --num_processes 2` on CPU: environments shared out, parameters identical."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import hashlib, json, sys
import torch
torch.set_num_threads(1)
from pi_rl import FlowPPOConfig, FlowPPOTrainer, make_env

policy, out = sys.argv[1:]
args = FlowPPOConfig(output_dir=out, use_cpu=True, num_iterations=2, num_envs=4, rollout_chunks=4, update_epochs=2,
                     per_device_train_batch_size=4, noise_std_min=0.4, noise_std_max=1.0, critic_hidden_sizes=[16],
                     learning_rate=1e-3, eval_episodes=4, save_every_iterations=2, disable_tqdm=True)
env = make_env("metaworld:handle-press-v3", 4 // args.world_size, 1, image_size=32, max_episode_steps=15,
               fast_rendering=True, hide_arm=True)
with env:
    trainer = FlowPPOTrainer(policy, args, env)
    trainer.train()
    digest = hashlib.sha256()
    for name, value in sorted(trainer.actor_critic.state_dict().items()):
        digest.update(value.numpy().tobytes())
    rollout = trainer._rollout.buffer.x
    noise = trainer.collector.collect(0).buffer.x[:, 0].view(4, -1, 5, 4)[0, :, 0, 0].tolist()
    record = {"parameters": digest.hexdigest(), "rollout": hashlib.sha256(rollout.numpy().tobytes()).hexdigest(),
              "samples": len(rollout), "first_values": noise, "env_steps": trainer.env_steps,
              "eval": trainer.last_evaluation.length.tolist(), "steps": trainer.state.global_step,
              "loss": [entry["ppo/policy_loss"] for entry in trainer.state.log_history if "loss" in entry]}
    open(f"{out}/rank{args.process_index}.json", "w").write(json.dumps(record))
"""


def launch(processes: int, script: Path, policy: Path, out: Path) -> list[dict]:
    out.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    layout = ROOT / "recipes" / "accelerate" / ("cpu.yaml" if processes == 1 else "cpu_ddp.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(layout)]
    done = subprocess.run(
        [*command, str(script), str(policy), str(out)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(small_pi0_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    script = root / "train.py"
    script.write_text(SCRIPT)
    return {processes: launch(processes, script, small_pi0_folder, root / str(processes)) for processes in (1, 2)}


def test_both_ranks_end_with_identical_parameters(runs):
    first, second = runs[2]
    assert first["parameters"] == second["parameters"]


def test_the_environments_are_shared_out(runs):
    first, second = runs[2]
    assert first["samples"] == second["samples"] == 8
    assert first["rollout"] != second["rollout"]
    assert first["env_steps"] == second["env_steps"] == runs[1][0]["env_steps"]


def test_two_processes_collect_and_evaluate_what_one_does(runs):
    """Environments are numbered over all processes, so the episodes are the same ones, up to batched rounding."""
    alone, first = runs[1][0], runs[2][0]
    assert alone["steps"] == 2 * first["steps"]  # twice the minibatch with two processes
    assert alone["first_values"] == pytest.approx(first["first_values"] + runs[2][1]["first_values"], abs=1e-4)
    assert len(alone["eval"]) == len(first["eval"]) == 4
