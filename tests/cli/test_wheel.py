"""What `pip install pi_rl` brings without a clone: the recipes that `pi-rl train --config NAME` finds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"


def test_a_wheel_holds_every_recipe(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pi_rl", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    configs = ROOT / "recipes" / "configs"
    wanted = {f"pi_rl/configs/{file.relative_to(configs)}" for file in configs.rglob("*.yaml")}
    assert wanted
    assert wanted <= held
