"""The card of a policy after supervised fine-tuning: what it was trained on, and that nobody has measured it yet."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pi_rl.__about__ import package_versions

if TYPE_CHECKING:
    from pi_rl.sft_recipe import SftArguments

TEMPLATE = Path(__file__).parent / "templates" / "sft_card.md"
CARD_NAME = "README.md"
TAGS = ("pi_rl", "imitation-learning", "flow-matching", "vision-language-action", "lerobot", "robotics")


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
    from huggingface_hub import ModelCard, ModelCardData

    base = None if Path(args.model).is_dir() else args.model
    data = args.dataset if args.dataset_root is None else None
    card = ModelCard.from_template(
        ModelCardData(
            library_name="lerobot",
            pipeline_tag="robotics",
            license=args.model_license,
            tags=list(TAGS),
            base_model=base,
            datasets=data,
        ),
        template_path=str(TEMPLATE),
        title=Path(folder).name,
        base=f"[{base}](https://huggingface.co/{base})" if base else "a base policy",
        part="the action expert alone" if args.expert_only else "the whole model",
        data=f"[{data}](https://huggingface.co/datasets/{data})" if data else "demonstrations",
        args=args,
        n_episodes=len(episodes),
        tasks=tasks,
        frames=frames,
        numbers=", ".join(map(str, episodes)) if len(episodes) <= 256 else "",
        command=command,
        versions=", ".join(f"{package} {version}" for package, version in package_versions().items()),
    )
    path = Path(folder) / CARD_NAME
    partial = path.with_name(f".{CARD_NAME}.partial")
    partial.write_text(str(card), encoding="utf-8")
    os.replace(partial, path)
    return path
