"""The card of a policy that has none: what it is and how to load it, without claims that nobody measured."""

import json
import os
from pathlib import Path

CARD_NAME = "README.md"
TAGS = ("pi_rl", "flow-matching", "vision-language-action", "lerobot", "robotics")


def write_checkpoint_card(folder: Path, *, run_folder: Path | None = None, repo_id: str | None = None) -> Path:
    """Writes ``README.md`` into a policy folder.

    Args:
        folder: LeRobot policy folder.
        run_folder: Output folder of the run that it comes from.
        repo_id: Hub id, used in the example.

    Returns:
        The card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["type"]
    state = folder / "rl_state.json"
    trained = ""
    if state.is_file():
        numbers = json.loads(state.read_text(encoding="utf-8"))
        trained = (
            f"Trained by {numbers['algorithm']} for {numbers['iteration']} iterations, {numbers['env_steps']:,} "
            f"environment steps. It was written during the run and not evaluated for this card.\n\n"
        )
    data = ModelCardData(library_name="lerobot", pipeline_tag="robotics", tags=list(TAGS))
    name = repo_id or "path/to/this/folder"
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {(repo_id or folder.name).rpartition('/')[2]}\n\n"
        f"A flow-matching policy of LeRobot type `{kind}`. {trained}\n\n"
        f"```\npi-rl eval --policy {name} --env …\n```\n"
    )
    path = folder / CARD_NAME
    partial = path.with_name(f".{CARD_NAME}.partial")
    partial.write_text(str(ModelCard(text)), encoding="utf-8")
    os.replace(partial, path)
    return path
