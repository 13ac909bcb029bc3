"""Demonstrations of ManiSkill tasks as a LeRobotDataset, for supervised fine-tuning (the paper's section 5.2.2).

Scripted controllers act, on states that no evaluation uses; successful episodes are kept, each with 15 trailing
frames in which the controller holds still, as in the paper. The paper plans motions instead. ManiSkill's planners need
mplib, and that does not run here: its versions 0.1.1 and 0.2.1 crash with a segmentation fault beside numpy 2, which
LeRobot needs. Planned demonstrations take an environment of their own with numpy 1.

Examples:
    python scripts/maniskill_demos.py --tasks PickCube-v1 --image-size 64
    python scripts/maniskill_demos.py --tasks PutCarrotOnPlateInScene-v1 --output outputs/demos/maniskill_carrot
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pi_rl.demonstrations import collect_demonstrations
from pi_rl.envs.maniskill_options import TASKS
from pi_rl.envs.registry import make_env

PAPER_TRAILING_FRAMES = 15


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    experts = sorted(name for name, task in TASKS.items() if task.expert is not None)
    parsed = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsed.add_argument(
        "--tasks", required=True, help=f"task, several with commas, or a group; with experts: {', '.join(experts)}"
    )
    parsed.add_argument("--episodes", type=int, default=144, help="episodes to keep of each task (default: 144)")
    parsed.add_argument("--output", type=Path, help="new folder (default: outputs/demos/TASKS)")
    parsed.add_argument("--repo-id", help="name recorded in the dataset (default: local/TASKS)")
    parsed.add_argument("--image-size", type=int, help="pixels; by default the task's own camera")
    parsed.add_argument("--max-steps", type=int, help="steps after which an attempt is given up")
    parsed.add_argument(
        "--trailing-steps",
        type=int,
        default=PAPER_TRAILING_FRAMES,
        help=f"frames after success (default: {PAPER_TRAILING_FRAMES}, the paper's)",
    )
    parsed.add_argument("--noise-std", type=float, default=0.0, help="action noise of the experts (default: none)")
    parsed.add_argument("--max-speed", type=float, default=1.0, help="bound of their actions, in (0, 1] (default: 1)")
    parsed.add_argument("--seed", type=int, default=0, help="of states and noise")
    parsed.add_argument("--workers", type=int, help="worker processes (default: one per core)")
    parsed.add_argument("--assets", help="folder of downloaded assets (default: MS_ASSET_DIR or ~/.maniskill)")
    return parsed


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    given = parser().parse_args(argv)
    name = given.tasks.replace(",", "_")
    options = {key: value for key in ("image_size", "assets") if (value := getattr(given, key)) is not None}
    with make_env(f"maniskill:{given.tasks}", 16, given.workers, **options) as env:
        summary = collect_demonstrations(
            env,
            episodes_per_task=given.episodes,
            output_dir=given.output or Path("outputs/demos") / name,
            repo_id=given.repo_id or f"local/{name}",
            noise_std=given.noise_std,
            max_speed=given.max_speed,
            max_steps=given.max_steps,
            trailing_steps=given.trailing_steps,
            seed=given.seed,
            progress=lambda kept, wanted, text: print(f"\r{kept}/{wanted} episodes, {text}", end="", flush=True),
        )
    print(f"\r{summary}")


if __name__ == "__main__":
    main()
