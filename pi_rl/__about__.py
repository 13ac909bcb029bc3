"""The version of pi_rl, written once, and the versions of what its results depend on.

Bug reports, checkpoints and `results.json` carry the same list.
"""

import platform
import re
from functools import cache
from importlib import metadata

__version__ = "0.1.0.dev0"

PACKAGES = (
    "lerobot",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "gymnasium",
    "mujoco",
    "metaworld",
)
SIMULATOR_PACKAGES = {
    "calvin": (),
    "gymnasium": ("gymnasium",),
    "libero": ("hf-libero", "robosuite", "mujoco"),
    "maniskill": ("mani-skill", "sapien"),
    "metaworld": ("metaworld", "mujoco"),
    "toy": (),
}
"""What a simulator's results depend on, by the first part of an environment's name."""


def package_versions(simulator: str | None = None) -> dict[str, str]:
    """Versions of pi_rl, Python and the packages that decide a result.

    Reads the metadata of installed distributions and imports none of them.

    Args:
        simulator: First part of an environment's name, such as "libero", whose packages are listed too.

    Returns:
        Name to version, in a fixed order; a package that is not installed has the value "not installed".
    """
    versions = {
        "pi_rl": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for name in (*PACKAGES, *SIMULATOR_PACKAGES.get(simulator or "", ())):
        versions[name] = _installed(name)
    return versions


@cache
def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def simulator_of(env: str) -> str:
    """First part of an environment's name."""
    return re.split(r"[:_]", env, maxsplit=1)[0]
