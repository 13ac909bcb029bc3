"""What can be downloaded, from where, how large it is, under which licence, and where simulators look for it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pi_rl.envs import libero_options
from pi_rl.envs.maniskill_options import ManiSkillOptions

CARROT_VARIABLE = "MANISKILL_ASSET_DIR"


@dataclass(frozen=True)
class Source:
    """One download.

    Attributes:
        name: Short name.
        simulator: What it belongs to: the argument of `pi-rl assets`.
        content: What it is.
        needed_for: The environments that need it.
        origin: Public address.
        licence: Under which terms it may be used; as far as its publisher says so.
        looked_for: Where simulators look for it, in that order.
        size: Bytes to download, about.
        required: Files or folders, relative to the target, without which it counts as missing.
        target: User's folder, or None for where simulators look, to the folder that is filled.
        repo: Dataset on the Hugging Face Hub, or None.
        prefix: Folder of that dataset that becomes the target; empty for all of it.
        archive: The zip file of that dataset that is unpacked into the target, or None for plain files.
        url: Address of a zip file that is not on the Hub, or None.
        sha256: Of the zip file, where its publisher fixes it.
    """

    name: str
    simulator: str
    content: str
    needed_for: str
    origin: str
    licence: str
    looked_for: str
    size: int
    required: tuple[str, ...]
    target: Callable[[Path | None], Path]
    repo: str | None = None
    prefix: str = ""
    archive: str | None = None
    url: str | None = None
    sha256: str | None = None

    def missing(self, target: Path) -> list[str]:
        """The required parts that a folder lacks."""
        return [name for name in self.required if not (target / name).exists()]


def libero_target(given: Path | None) -> Path:
    """The folder that gets LIBERO's assets: the user's, else the first of LIBERO's places outside its package."""
    if given is not None:
        return given
    named = os.environ.get(libero_options.ASSETS_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "libero" / "assets"


def libero_found() -> Path | None:
    """Where LIBERO's assets are already, or None."""
    try:
        return libero_options.find_assets()
    except (FileNotFoundError, RuntimeError):  # missing, or hf-libero is not installed
        return None


def maniskill_data(given: Path | None) -> Path:
    """ManiSkill's folder of data below the user's folder, `MS_ASSET_DIR` or `~/.maniskill`."""
    return ManiSkillOptions(assets=None if given is None else str(given)).asset_folder / "data"


def carrot_target(given: Path | None) -> Path:
    """The folder `carrot`: below `MANISKILL_ASSET_DIR` if that is set, else among ManiSkill's data."""
    named = os.environ.get(CARROT_VARIABLE)
    return (Path(named) if named and given is None else maniskill_data(given)) / "carrot"


SOURCES = (
    Source(
        name="LIBERO's assets",
        simulator="libero",
        content="meshes, textures and scenes",
        needed_for="all LIBERO environments",
        origin="https://huggingface.co/datasets/lerobot/libero-assets",
        licence="none stated for the data set; parts are from NVIDIA HOPE (non-commercial), Google Scanned Objects "
        "(CC BY 4.0) and TurboSquid (no redistribution of single models)",
        looked_for=f"the option assets, {libero_options.ASSETS_VARIABLE}, inside hf-libero, ~/.cache/libero/assets",
        size=422_320_936,
        required=libero_options.ASSET_FOLDERS,
        target=libero_target,
        repo="lerobot/libero-assets",
    ),
    Source(
        name="BridgeData scenes",
        simulator="maniskill",
        content="objects, tables and photographs of SIMPLER's WidowX tasks",
        needed_for="the SIMPLER tasks and the generalisation benchmark",
        origin="https://huggingface.co/datasets/haosulab/ManiSkill_bridge_v2_real2sim",
        licence="MIT",
        looked_for="data/tasks/bridge_v2_real2sim_dataset in the option assets, MS_ASSET_DIR or ~/.maniskill",
        size=81_962_479,
        required=("stages/bridge_table_1_v1.glb", "custom/models", "real_inpainting"),
        target=lambda given: maniskill_data(given) / "tasks" / "bridge_v2_real2sim_dataset",
        repo="haosulab/ManiSkill_bridge_v2_real2sim",
        archive="bridge_v2_real2sim_dataset.zip",
        sha256="618512a205b4528cafecdad14b1788ed1130879f3064deb406516ed5b9c5ba92",
    ),
    Source(
        name="WidowX 250 S",
        simulator="maniskill",
        content="the robot's description and meshes",
        needed_for="the SIMPLER tasks and the generalisation benchmark",
        origin="https://github.com/haosulab/ManiSkill-WidowX250S (v0.2.0)",
        licence="none stated; the model is SimplerEnv's (MIT)",
        looked_for="data/robots/widowx in the option assets, MS_ASSET_DIR or ~/.maniskill",
        size=1_200_000,
        required=("wx250s.urdf",),
        target=lambda given: maniskill_data(given) / "robots" / "widowx",
        url="https://github.com/haosulab/ManiSkill-WidowX250S/archive/refs/tags/v0.2.0.zip",
    ),
    Source(
        name="RL4VLA's objects",
        simulator="maniskill",
        content="25 objects, 17 receptacles, 21 tables and textures",
        needed_for="the generalisation benchmark",
        origin="https://huggingface.co/datasets/RLinf/maniskill_assets (also github.com/gen-robot/RL4VLA, in "
        "ManiSkill/mani_skill/assets)",
        licence="none stated for the data set; RL4VLA's repository is under MIT",
        looked_for=f"carrot in {CARROT_VARIABLE}, or data/carrot in the option assets, MS_ASSET_DIR or ~/.maniskill",
        size=85_000_000,
        required=("more_carrot/model_db.json", "more_plate/model_db.json", "more_table/imgs", "more_table/textures"),
        target=carrot_target,
        repo="RLinf/maniskill_assets",
        prefix="carrot",
    ),
)
"""In the order in which they are shown and downloaded."""

SIMULATORS = tuple(dict.fromkeys(source.simulator for source in SOURCES))
WITHOUT_DOWNLOAD = {
    "metaworld": "nothing: its package holds everything",
    "gymnasium, toy": "nothing",
    "calvin": "a checkout of github.com/mees/calvin, named by the option root or by PI_RL_CALVIN_ROOT, and an "
    "interpreter of its own; the error of `pi-rl eval --env calvin_abc_d` gives the commands that install them",
}
"""Simulators for which there is nothing to download here."""
