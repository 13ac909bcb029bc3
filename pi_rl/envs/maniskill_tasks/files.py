"""Where the models and photographs of the WidowX tasks are, and what is said when they are not; no simulator here."""

import os
from collections.abc import Iterable
from pathlib import Path

BRIDGE_SOURCE = "`pi-rl assets maniskill` (the data set haosulab/ManiSkill_bridge_v2_real2sim on the Hugging Face Hub)"
ROBOT_SOURCE = "`pi-rl assets maniskill` (github.com/haosulab/ManiSkill-WidowX250S, v0.2.0)"
CARROT_SOURCE = (
    "`pi-rl assets maniskill` (the folder `carrot` of the data set RLinf/maniskill_assets on the Hugging Face Hub or "
    "of github.com/gen-robot/RL4VLA); MANISKILL_ASSET_DIR names another folder that holds `carrot`"
)
VISUALS = ("textured.obj", "textured.dae", "textured.glb")
"""Names that the visual mesh of a model may have, in the order they are looked for."""


def data_folder() -> Path:
    """ManiSkill's folder of downloaded data: `data` in MS_ASSET_DIR, which is `~/.maniskill` if not set."""
    return Path(os.environ.get("MS_ASSET_DIR") or Path.home() / ".maniskill") / "data"


def bridge_folder() -> Path:
    """The scenes of SIMPLER's WidowX tasks."""
    return data_folder() / "tasks" / "bridge_v2_real2sim_dataset"


def carrot_folder() -> Path:
    """Objects, receptacles and tables of the generalisation benchmark."""
    return Path(os.environ.get("MANISKILL_ASSET_DIR") or data_folder()) / "carrot"


def visual_mesh(model: Path) -> Path:
    """The visual mesh in a model's folder; the last of `VISUALS` if there is none."""
    found = [model / name for name in VISUALS if (model / name).is_file()]
    return found[0] if found else model / VISUALS[-1]


def model_files(model: Path) -> tuple[Path, Path]:
    """The two files of a model: collision shapes and visual mesh."""
    return model / "collision.obj", visual_mesh(model)


def check(task: str, folder: Path, paths: Iterable[Path], source: str) -> None:
    """Refuses to go on without files.

    Args:
        task: What needs them.
        folder: Where they belong.
        paths: All that are needed, inside the folder.
        source: Where they come from.

    Raises:
        FileNotFoundError: Names every missing file, the folder and the source.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        names = ", ".join(str(path.relative_to(folder)) for path in missing)
        raise FileNotFoundError(
            f"{task} needs {names} in {folder}, and there {'is' if len(missing) == 1 else 'are'} no such "
            f"file{'' if len(missing) == 1 else 's'}; source: {source}"
        )


def check_robot(task: str) -> None:
    """Refuses to go on without the WidowX; ManiSkill would ask on the terminal whether to download it."""
    folder = data_folder() / "robots" / "widowx"
    check(task, folder, [folder / "wx250s.urdf"], ROBOT_SOURCE)
