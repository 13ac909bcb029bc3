"""The checkpoint-N folders of a run in the order in which they were written; imports no torch.

N counts optimiser steps, and comes once more where a run is resumed from an early checkpoint. ``save`` in a
checkpoint's ``rl_state.json`` counts the saves, over all branches; unlike the time of a file it survives copying.
"""

import json
import re
from pathlib import Path

RL_STATE_NAME = "rl_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(root: Path) -> list[Path]:
    """The checkpoint-N folders of a run, complete or not, in the order of N."""
    found = [path for path in root.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """N of a folder checkpoint-N: optimiser steps made before it was written."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not named checkpoint-N.")
    return int(match[1])


def save_of(folder: Path) -> int | None:
    """Number of the save that wrote a checkpoint, 0 if it was not counted; None if that cannot be read."""
    try:
        number = json.loads((folder / RL_STATE_NAME).read_text(encoding="utf-8")).get("save", 0)
    except (ValueError, OSError, AttributeError, RecursionError):
        return None
    return number if isinstance(number, int) else None


def by_age(root: Path) -> list[Path]:
    """Checkpoints of a run, complete or not, those written last at the end.

    One that cannot tell has its place by N: after the last one if N is higher, else before all.
    """
    found = {folder: save_of(folder) for folder in checkpoints(root)}
    saves = {folder: save for folder, save in found.items() if save is not None}
    ordered = sorted(saves, key=lambda folder: (saves[folder], step_of(folder)))
    newest = step_of(ordered[-1]) if ordered else -1
    unknown = [folder for folder in found if folder not in saves]
    return [
        *(folder for folder in unknown if step_of(folder) <= newest),
        *ordered,
        *(folder for folder in unknown if step_of(folder) > newest),
    ]
