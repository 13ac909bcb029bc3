"""Whether memory stays flat over many updates, wherever prefixes wait.

    python scripts/benchmark_memory.py                        # 1,000 updates for every prefix_storage, about 5 minutes
    python scripts/benchmark_memory.py --storage disk --updates 3000

Every run is a process of its own: FlowPPOTrainer with a small π0 in MetaWorld, action expert and heads trained, a new
rollout every 50 updates. The resident memory of the training process (not of the simulators) is read after the first
100 updates and after the last; growth is the difference. Pages of the file of "disk" count as resident while they are
mapped. Prints and writes JSON, and fails if a run grew by more than --limit_mb.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STORAGES = ("device", "host", "disk", "recompute")
WARM_UP, PER_ITERATION = 100, 50


def train(storage: str, updates: int) -> dict[str, Any]:
    """One run in this process."""
    import psutil
    import torch
    from transformers import TrainerCallback

    from pi_rl import FlowPPOConfig, FlowPPOTrainer
    from pi_rl.policies.small.create import create_small_policy

    torch.set_num_threads(1)
    process, readings = psutil.Process(), {}

    class ReadMemory(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % WARM_UP == 0:
                readings[state.global_step] = process.memory_info().rss

    with tempfile.TemporaryDirectory() as folder:
        policy = create_small_policy(
            "pi0", cameras={"observation.image": (64, 64)}, state_dim=4, action_dim=4, image_size=64, chunk_size=5,
            n_action_steps=5, denoising_steps=4, instructions=["press the handle"], output_dir=f"{folder}/policy",
            seed=0,
        )  # fmt: skip
        args = FlowPPOConfig(
            output_dir=f"{folder}/run", use_cpu=True, num_iterations=updates // PER_ITERATION, num_envs=4,
            rollout_chunks=4, per_device_train_batch_size=8, update_epochs=PER_ITERATION // 2,
            noise="flow_sde", critic_hidden_sizes=[16], eval_episodes=0, disable_tqdm=True, prefix_storage=storage,
        )  # fmt: skip
        options = {"image_size": 64, "fast_rendering": True, "max_episode_steps": 20}
        trainer = FlowPPOTrainer(str(policy), args, "metaworld:handle-press-v3", options, callbacks=[ReadMemory()])
        try:
            trainer.train()
            stored = trainer.collector._inputs.nbytes
        finally:
            trainer.close()
    growth = readings[max(readings)] - readings[WARM_UP]
    return {
        "storage": storage,
        "updates": max(readings),
        "stored_mb": stored / 1e6,
        "rss_mb": {step: round(value / 1e6, 2) for step, value in readings.items()},
        "growth_mb": round(growth / 1e6, 2),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--updates", type=int, default=1000, help=f"optimiser steps, a multiple of {WARM_UP}")
    parser.add_argument("--limit_mb", type=float, default=10.0, help="growth that is accepted")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_memory/memory.json"))
    parser.add_argument("--here", action="store_true", help="one storage, in this process; prints its JSON")
    options = parser.parse_args()
    if options.updates % WARM_UP or options.updates <= WARM_UP:
        parser.error(f"--updates {options.updates} must be a multiple of {WARM_UP} above {WARM_UP}")
    return options


def main() -> None:
    options = parse()
    if options.here:
        print("RESULT " + json.dumps(train(options.storage[0], options.updates)))
        return
    results = []
    for storage in options.storage:
        command = [sys.executable, __file__, "--here", "--storage", storage, "--updates", str(options.updates)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.split("RESULT ")[-1]))
        print(json.dumps(results[-1]), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    grown = [result["storage"] for result in results if result["growth_mb"] > options.limit_mb]
    if grown:
        raise SystemExit(f"memory grew by more than {options.limit_mb} MB with {', '.join(grown)}")


if __name__ == "__main__":
    main()
