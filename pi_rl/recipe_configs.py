"""The recipes' YAML files that come with the package: found by name, with the algorithm they are written for."""

import difflib
from pathlib import Path

from pi_rl.arguments import ArgumentsError, read_config

CONFIGS = Path(__file__).parent / "configs"
SFT_FOLDER = "sft"
BASES = ("base", "pi0", "pi05", "maniskill")
"""Files that others inherit from and that are no recipes themselves."""
NOISE = {"ppo": "flow_noise", "grpo": "flow_sde"}
"""Exploration noise of each algorithm's recipes where the file leaves it open."""


def config_names(*, sft: bool = False) -> list[str]:
    """Names of the recipes' files, such as ``"libero/pi0_long_flow_sde"``, without :data:`BASES`.

    Args:
        sft: Those of supervised fine-tuning instead of reinforcement learning.
    """
    files = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.stem not in BASES]
    return [
        str(path.relative_to(CONFIGS).with_suffix("")) for path in files if (path.parent.name == SFT_FOLDER) == sft
    ]


def find_config(given: str, *, sft: bool = False) -> Path:
    """The file that ``--config`` names.

    Args:
        given: A file, or a name of :func:`config_names`; its last part does where it is the only one.
        sft: As for :func:`config_names`.

    Raises:
        ArgumentsError: It is neither; the message has the nearest names.
    """
    file = Path(given).expanduser()
    if file.is_file():
        return file
    names = config_names(sft=sft)
    wanted = given.removesuffix(".yaml")
    found = [name for name in names if wanted in (name, name.rpartition("/")[2])]
    if len(found) == 1:
        return CONFIGS / f"{found[0]}.yaml"
    near = found or difflib.get_close_matches(wanted, names, n=3, cutoff=0.4)
    last = {name.rpartition("/")[2]: name for name in names}
    near = near or [last[name] for name in difflib.get_close_matches(Path(wanted).name, last, n=3, cutoff=0.4)]
    what = "fits several recipes" if found else "is neither a file nor the name of a recipe"
    raise ArgumentsError(f"--config {given} {what}; {'they are' if found else 'the nearest are'} {', '.join(near)}.")


def algorithm_of(config: Path) -> str:
    """The algorithm that a file is written for: "grpo" where it or a base of it sets ``group_size``, else "ppo".

    Raises:
        ArgumentsError: The file cannot be read.
    """
    return "grpo" if "group_size" in read_config(config) else "ppo"
