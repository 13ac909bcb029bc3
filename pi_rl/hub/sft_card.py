"""The card of a policy after supervised fine-tuning: what it was trained on, and that nobody has measured it yet."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pi_rl.__about__ import package_versions
from pi_rl.hub.card import (
    OWN_TYPES,
    card_metadata,
    fenced,
    license_metadata,
    license_sentence,
    policy_config,
    save_card,
    version_lines,
)
from pi_rl.hub.model_card import SIMULATION_LIMITS, SMALL_LIMITS

if TYPE_CHECKING:
    from pi_rl.sft_recipe import SftArguments


def write_sft_card(
    folder: str | Path, args: "SftArguments", *, episodes: Sequence[int], tasks: int, frames: int, command: str
) -> Path:
    """Writes ``README.md`` into the folder of a fine-tuned policy.

    Base model and dataset are named when they are Hub ids; folders of this machine are not shown.

    Args:
        folder: LeRobot policy folder.
        args: The recipe's options.
        episodes: Episodes it was trained on.
        tasks: How many tasks they show.
        frames: Their frames.
        command: Command line that repeats the run.

    Returns:
        The card.
    """
    target = Path(folder)
    policy_type = policy_config(target)["type"]
    base = None if Path(args.model).is_dir() else args.model
    data = args.dataset if args.dataset_root is None else None
    return save_card(
        target,
        "sft_card.md",
        card_metadata(
            policy_type=policy_type,
            license=args.model_license,
            tags=["imitation-learning"],
            base_model=base,
            dataset=data,
        ),
        title=target.name,
        base=f"[{base}](https://huggingface.co/{base})" if base else "a base policy",
        part="the action expert alone" if args.expert_only else "the whole model",
        data=f"[{data}](https://huggingface.co/datasets/{data})" if data else "demonstrations",
        args=args,
        n_episodes=len(episodes),
        tasks=tasks,
        frames=frames,
        numbers=", ".join(map(str, episodes)) if len(episodes) <= 256 else "",
        command=fenced(command, "bash"),
        versions=version_lines(package_versions(), "")["packages"],
        load_from="path/to/this/folder",
        env="",
        policy_type=policy_type,
        needs_package=policy_type.endswith("_small"),
        limits=[*(SMALL_LIMITS if policy_type in OWN_TYPES else ()), SIMULATION_LIMITS[0]],
        licence=license_sentence(license_metadata(args.model_license, policy_type)),
    )
