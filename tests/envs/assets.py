"""Files of simulators that tests need and the repository does not hold: unpacked from the folder in `PI_RL_DATA`.

Each archive is unpacked once into the machine's temporary folder, under a name made from its content, and found there
by later runs. A test that needs files fails without them; it never skips itself.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

VARIABLE = "PI_RL_DATA"


def libero_assets() -> Path:
    """The folder with LIBERO's meshes, textures and scenes."""
    return _unpacked("libero_assets.tar.zst")


def maniskill_assets() -> Path:
    """The folder with `data` (for `MS_ASSET_DIR`) and `carrot_root` (objects of the generalisation benchmark)."""
    return _unpacked("maniskill_assets.tar.zst")


@functools.cache
def _unpacked(name: str) -> Path:
    given = os.environ.get(VARIABLE, "")
    archive = Path(given) / name
    if not given or not archive.is_file():
        state = f"{VARIABLE} is not set" if not given else f"{archive} does not exist"
        pytest.fail(f"{state}; set {VARIABLE} to the folder that holds {name} (see CONTRIBUTING.md)", pytrace=False)
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"pi_rl_test_data_{os.getuid()}" / f"{name.partition('.')[0]}_{digest}"
    if not folder.is_dir():
        _unpack(archive, folder)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks beside the folder and renames, so that an interrupted or simultaneous run leaves nothing half done."""
    if shutil.which("zstd") is None:
        pytest.fail(f"unpacking {archive.name} needs zstd: `sudo apt-get install zstd`", pytrace=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}_", dir=folder.parent))
    command = ["tar", "--use-compress-program=zstd", "-xf", str(archive), "-C", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(partial)
        pytest.fail(f"{archive} could not be unpacked: {done.stderr.strip()}", pytrace=False)
    try:
        partial.rename(folder)
    except OSError:  # another run was faster
        shutil.rmtree(partial)
