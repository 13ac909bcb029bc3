"""Predicted against measured memory of each phase of a run, as JSON.

    python scripts/benchmark_plan.py                       # CPU: a small model, resident memory
    python scripts/benchmark_plan.py --device cuda --config recipes/configs/libero/pi0_long_flow_sde.yaml --bf16 \\
        --gradient_checkpointing --num_envs=16 --per_device_train_batch_size=8 --global_batch_size=32

What is measured runs in a process of its own, on random weights: the phases that the plan counts, on real tensors.
Options of the run follow those of this script.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from pi_rl.planning.measure import MALLOC_SETTINGS, measure_phases
from pi_rl.planning.model import build_planned, find_policy
from pi_rl.planning.phases import Phases, count_phases
from pi_rl.planning.plan import ALGORITHMS, run_options

# about 1.3 GB with optimiser and gradients: large beside what a process itself varies by
SMALL_RUN = (
    "--env=metaworld:handle-press-v3",
    "--small_model_sizes={vlm_width: 512, expert_width: 512, depth: 8, num_heads: 8, head_dim: 64, mlp_dim: 4096, "
    "vision_width: 256, vision_mlp: 1024}",
    "--image_resolution=112",
    "--chunk_size=20",
    "--num_envs=16",
    "--rollout_chunks=4",
    "--per_device_train_batch_size=16",
    "--noise=flow_sde",
)
PHASES = ("encode", "act", "forward", "backward", "step")
_WORKER = "--measure"


def main() -> None:
    """Prints predicted and measured bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure (default: cpu)")
    parser.add_argument("--algorithm", default="ppo", choices=tuple(ALGORITHMS), help="of the run (default: ppo)")
    parser.add_argument(_WORKER, action="store_true", help="only measure; for the process that this script starts")
    values, words = parser.parse_known_args()
    if values.measure:
        print(json.dumps(memory_of(phases_of(words or SMALL_RUN, values.algorithm, values.device, real=True))))
        return
    predicted = phases_of(words or SMALL_RUN, values.algorithm, values.device, real=False)
    measured = measure(sys.argv[1:])
    print(json.dumps(compare(memory_of(predicted), measured), indent=2))


def phases_of(words: Any, algorithm: str, device: str, *, real: bool) -> Phases:
    """Counts or measures the phases of a run.

    Args:
        words: The run's options.
        algorithm: "ppo" or "grpo".
        device: "cpu" or "cuda".
        real: Run on real tensors instead of counting.
    """
    config_class, trainer_class = ALGORITHMS[algorithm]
    recipe, args, spec = run_options(words, config_class)
    planned = find_policy(recipe, args, spec)
    gpu = device == "cuda"
    where = device if real else "meta"
    model = build_planned(planned, args, trainer_class, recipe.peft_config(), gpu=gpu, device=where)
    return measure_phases(model, args, spec) if real else count_phases(model, args, spec, gpu=gpu)


def memory_of(phases: Phases) -> dict[str, int]:
    """Bytes of weights and optimiser, and the most that each phase needs beside the weights."""
    start = phases.encode.before
    counts = {name: getattr(phases, name) for name in PHASES}
    found = {f"{name}: peak": count.peak - start for name, count in counts.items()}
    return {"weights": phases.weight_bytes, "optimiser": phases.optimizer, **found}


def measure(words: list[str]) -> dict[str, int]:
    """What a process of its own measures."""
    environment = {**os.environ, **MALLOC_SETTINGS}
    command = [sys.executable, __file__, _WORKER, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Measuring failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(predicted: dict[str, int], measured: dict[str, int]) -> dict[str, Any]:
    """Both beside each other.

    Returns:
        Bytes and predicted / measured of every entry, and the same of the whole peak, weights included.
    """
    peaks = [max(value for name, value in each.items() if "peak" in name) for each in (predicted, measured)]
    total = [each["weights"] + peak for each, peak in zip((predicted, measured), peaks, strict=True)]
    rows = {name: {"predicted": predicted[name], "measured": measured[name]} for name in predicted}
    rows["peak"] = {"predicted": total[0], "measured": total[1]}
    for row in rows.values():
        row["ratio"] = round(row["predicted"] / row["measured"], 4)  # type: ignore[assignment]
    return rows


if __name__ == "__main__":
    main()
