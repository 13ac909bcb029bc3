"""`accelerate launch --num_processes 2` on CPU: environments shared out, parameters identical."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = """
import hashlib, json, os, sys
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
from pi_rl import FlowGRPOConfig, FlowGRPOTrainer, FlowPPOConfig, FlowPPOTrainer, make_env

policy, toy_policy, out = sys.argv[1:]
world = int(os.environ.get("WORLD_SIZE", "1"))
# one minibatch of all 16 samples: its gradient does not depend on how processes share and shuffle them
args = FlowPPOConfig(output_dir=out, use_cpu=True, num_iterations=1, num_envs=4, rollout_chunks=4, update_epochs=3,
                     per_device_train_batch_size=16 // world, noise_std_min=0.4,
                     noise_std_max=1.0, critic_hidden_sizes=[16], learning_rate=1e-4, lr_scheduler_type="constant",
                     eval_episodes=4, save_every_iterations=1, disable_tqdm=True)
env = make_env("metaworld:handle-press-v3", 4 // args.world_size, 1, image_size=32, max_episode_steps=15,
               fast_rendering=True, hide_arm=True)
with env:
    trainer = FlowPPOTrainer(policy, args, env)
    first = trainer.collector.collect(0)
    drawn = first.x[:, -1].unflatten(0, (4, -1))[:, :, 0].transpose(0, 1)  # (envs, chunks, actions)
    trainer.train()
    trainer.evaluate()
    state = {name: value.contiguous() for name, value in trainer.actor_critic.state_dict().items()}
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in sorted(state.items())))
    record = {"parameters": digest.hexdigest(), "samples": len(first.x), "actions": drawn.tolist(),
              "env_steps": trainer.env_steps, "steps": trainer.state.global_step,
              "lengths": trainer.last_evaluation.length.tolist(),
              "history": [{k: v for k, v in entry.items() if k.startswith(("policy/", "critic/", "rollout/"))}
                          for entry in trainer.state.log_history if "loss" in entry]}
    open(f"{out}/rank{args.process_index}.json", "w").write(json.dumps(record))
    save_file(state, f"{out}/rank{args.process_index}.safetensors")

# the other algorithms in a quick environment, again with one minibatch of everything
for name, make_config, make_trainer, options in (
    ("two_layer", FlowPPOConfig, FlowPPOTrainer, dict(noise="flow_sde", mdp="two_layer", critic="expert",
     critic_hidden_sizes=[16], normalize_rewards=True, rollout_epochs=2, rollout_chunks=4,
     per_device_train_batch_size=256 // world)),
    ("grpo", FlowGRPOConfig, FlowGRPOTrainer, dict(noise="flow_noise", noise_std_min=0.4, noise_std_max=1.0,
     group_size=4, seed=1, rollout_chunks=6, per_device_train_batch_size=48 // world)),
):
    args = make_config(output_dir=f"{out}/{name}", use_cpu=True, num_iterations=3, num_envs=8,
                       update_epochs=2, learning_rate=1e-3, lr_scheduler_type="constant", denoising_steps=4,
                       eval_episodes=0, disable_tqdm=True, **options)
    trainer = make_trainer(toy_policy, args, "toy:point-mass", {"max_episode_steps": 12, "tolerance": 0.29})
    trainer.train()
    trained = {key: value.contiguous() for key, value in trainer.actor_critic.state_dict().items()}
    save_file(trained, f"{out}/{name}-rank{args.process_index}.safetensors")
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    open(f"{out}/{name}-rank{args.process_index}.json", "w").write(json.dumps(history))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter
"""


def launch(processes: int, script: Path, policies: list[Path], out: Path) -> list[dict]:
    out.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    layout = ROOT / "recipes" / "accelerate" / ("cpu.yaml" if processes == 1 else "cpu_ddp.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(layout)]
    done = subprocess.run(
        [*command, str(script), *map(str, policies), str(out)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def runs(small_pi0_folder, mlp_folder, run_folder):
    script = run_folder / "train.py"
    script.write_text(SCRIPT)
    return {count: launch(count, script, [small_pi0_folder, mlp_folder], run_folder / str(count)) for count in (1, 2)}


@pytest.mark.slow
def test_both_ranks_end_with_identical_parameters(runs):
    first, second = runs[2]
    assert first["parameters"] == second["parameters"]


@pytest.mark.slow
def test_the_environments_are_shared_out(runs):
    """Environments are numbered over all processes: two processes act as one does, each for its half."""
    alone, (first, second) = runs[1][0], runs[2]
    assert first["samples"] == second["samples"] == alone["samples"] // 2 == 8
    assert first["env_steps"] == second["env_steps"] == alone["env_steps"]
    torch.testing.assert_close(
        torch.tensor(first["actions"] + second["actions"]), torch.tensor(alone["actions"]), rtol=0, atol=1e-4
    )


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(runs, run_folder):
    one, two = (load_file(run_folder / str(processes) / "rank0.safetensors") for processes in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert runs[1][0]["steps"] == runs[2][0]["steps"] == 3
    for name, value in runs[1][0]["history"][0].items():
        assert runs[2][0]["history"][0][name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


@pytest.mark.slow
def test_evaluation_covers_every_state_once_over_the_processes(runs):
    assert runs[2][0]["lengths"] == runs[2][1]["lengths"]
    assert len(runs[2][0]["lengths"]) == 4
    assert all(0 < length <= 15 for length in runs[2][0]["lengths"])


@pytest.mark.parametrize("name", ["two_layer", "grpo"])
@pytest.mark.slow
def test_other_algorithms_learn_with_two_processes_what_they_learn_with_one(runs, run_folder, name):
    one = load_file(run_folder / "1" / f"{name}-rank0.safetensors")
    first, second = (load_file(run_folder / "2" / f"{name}-rank{rank}.safetensors") for rank in range(2))
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=2e-3, atol=5e-5, msg=lambda text, key=key: f"{key}: {text}")
    alone, shared = (json.loads((run_folder / count / f"{name}-rank0.json").read_text()) for count in ("1", "2"))
    assert len(alone) == len(shared) == 3
    if name == "grpo":  # at first only the group of the second process teaches something
        assert 0 < alone[0]["groups/informative"] < 1
    for before, after in zip(alone, shared, strict=True):
        for key in before.keys() - {"learning_rate", "epoch", "step"}:
            if not key.startswith(("time/", "policy/ratio_error")):
                assert after[key] == pytest.approx(before[key], rel=5e-3, abs=5e-4), key
