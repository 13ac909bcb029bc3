"""Folders as runs leave them, written from figures: for the report and the cards of checkpoints."""

import json

import numpy as np

from pi_rl.hub.results import write_results
from pi_rl.hub.videos import write_video

CONFIG = """\
# Policy
model: null
model_license: other
small_model: pi0
env: metaworld:press-v3,pull-v3
output_dir: {folder}
noise: flow_sde
num_iterations: 6
eval_episodes: 40
eval_seed: 3
critic: vlm
seed: 1
"""
BEGAN = {"began": "2026-01-02T03:04:05+0000", "versions": {"lerobot": "0.6.1", "metaworld": "3.0.0"}}


def evaluation_entry(step, env_steps, rate, **more):
    return {
        "step": step,
        "epoch": step / 4,
        "env_steps": env_steps,
        "eval_success_rate": rate,
        "eval_ci95_low": rate - 0.1,
        "eval_ci95_high": rate + 0.1,
        "eval_n_episodes": 40.0,
        "eval_success_rate/press-v3": rate + 0.05,
        "eval_success_rate/pull-v3": rate - 0.05,
        **more,
    }


def iteration_entry(i, **more):
    return {
        "step": 4 * i,
        "epoch": float(i),
        "iteration": float(i),
        "loss": 0.1,
        "env_steps": 1000.0 * i,
        "episodes": 20.0 * i,
        "rollout/success_rate": 0.5 + 0.05 * i,
        "rollout/env_steps": 1000.0,
        "rollout/failed_episodes": 0.0,
        "rollout/return": 0.5 + 0.05 * i,
        "policy/approx_kl": 0.03 / i,
        "policy/clip_fraction": 0.2 / i,
        "critic/explained_variance": 0.1 * i,
        "time/rollout": 3.0,
        "time/update": 1.0,
        **more,
    }


def full_history(iterations=6):
    first = [evaluation_entry(0, 0.0, 0.5)]
    history = [*first, *(iteration_entry(i) for i in range(1, iterations + 1))]
    middle = evaluation_entry(12, 3000.0, 0.6)
    return [*history[:4], middle, *history[4:]] if iterations > 3 else history


def write_metrics(folder, entries, *, starts=1):
    lines = [*([BEGAN] * starts), *entries]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder, *, results=None, history=None, config=CONFIG, video=False):
    """The folder of a run; with results of one that has ended."""
    folder.mkdir(parents=True)
    (folder / "pi_rl_config.yaml").write_text(config.format(folder=folder))
    (folder / "stages.json").write_text(json.dumps({"demonstrations": 1.5, "rl": 4.0}))
    write_metrics(folder, full_history() if history is None else history)
    if results is not None:
        results.config.update(env="metaworld:press-v3,pull-v3", algorithm="PPO", model=None)
        write_results(folder, results)
    if video:
        frames = np.zeros((6, 48, 96, 3), np.uint8)
        frames[:, :, 48:] = 200
        write_video(frames, folder / "before_after.mp4", 10)
    return folder
