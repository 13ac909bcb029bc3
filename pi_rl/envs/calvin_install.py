"""Finds the user's CALVIN checkout and the interpreter that runs it, and says what to install where one is missing."""

import json
import os
import shutil
import subprocess
from pathlib import Path

ROOT_VARIABLE = "PI_RL_CALVIN_ROOT"
PYTHON_VARIABLE = "PI_RL_CALVIN_PYTHON"
MINIMUM_PYTHON = (3, 11)
PROBE_TIMEOUT_S = 60.0
REQUIRED_MODULES = ("numpy", "yaml", "pybullet", "hydra", "omegaconf", "gym", "cv2", "scipy", "git", "quaternion")
"""What calvin_env imports, and what its configuration files need."""

RULES = "calvin_models/calvin_agent/evaluation/multistep_sequences.py"
STATES = "calvin_models/calvin_agent/evaluation/utils.py"
ANNOTATIONS = "calvin_models/conf/annotations/new_playtable_validation.yaml"
ORACLE = "calvin_models/conf/callbacks/rollout/tasks/new_playtable_tasks.yaml"
SIMULATOR = "calvin_env/calvin_env/envs/play_table_env.py"
CONFIGURATION = "calvin_env/conf"
DATA = "calvin_env/data"
FILES = (RULES, STATES, ANNOTATIONS, ORACLE, SIMULATOR, CONFIGURATION, DATA)
"""Parts of the checkout that are used; paths below its root."""

PACKAGES = (
    'pybullet==3.2.7 "numpy<2" gym==0.26.2 "hydra-core>=1.3,<1.4" omegaconf opencv-python-headless scipy '
    "gitpython numpy-quaternion"
)
INSTALL = f"""CALVIN runs under a Python of its own (pybullet has no wheel for 3.12). To install it:
    git clone --recurse-submodules https://github.com/mees/calvin.git
    uv venv --python 3.11 calvin/.venv
    uv pip install --python calvin/.venv/bin/python {PACKAGES}
    export {ROOT_VARIABLE}="$PWD/calvin"
The interpreter calvin/.venv/bin/python is then found by itself; {PYTHON_VARIABLE} names another one."""


def find_root(given: str | None) -> Path:
    """Finds the checkout of https://github.com/mees/calvin.

    Args:
        given: Its path, or None for the one in `PI_RL_CALVIN_ROOT`.

    Returns:
        The absolute path.

    Raises:
        FileNotFoundError: None was given, it is no directory, or a part that is used is missing.
    """
    named = given or os.environ.get(ROOT_VARIABLE, "")
    if not named:
        raise FileNotFoundError(f"no CALVIN checkout: the option root and {ROOT_VARIABLE} are both unset. {INSTALL}")
    root = Path(named).expanduser().resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"the CALVIN checkout {named} is not a directory. {INSTALL}")
    missing = [name for name in FILES if not (root / name).exists()]
    if missing:
        hint = (
            "calvin_env is a submodule: git submodule update --init. " if missing[0].startswith("calvin_env") else ""
        )
        raise FileNotFoundError(f"the CALVIN checkout {root} lacks {', '.join(missing)}. {hint}{INSTALL}")
    return root


def find_python(given: str | None, root: Path) -> str:
    """Finds the interpreter that has pybullet and what else calvin_env imports.

    Args:
        given: Its path or command, or None for `PI_RL_CALVIN_PYTHON`, else `.venv/bin/python` in the checkout.
        root: The checkout.

    Returns:
        The path of an interpreter that has all of `REQUIRED_MODULES`.

    Raises:
        FileNotFoundError: There is none, it does not run, it is older than 3.11, or it lacks packages.
    """
    beside = root / ".venv" / "bin" / "python"
    named = given or os.environ.get(PYTHON_VARIABLE) or (str(beside) if beside.exists() else "")
    if not named:
        raise FileNotFoundError(
            f"no interpreter for CALVIN: the option python and {PYTHON_VARIABLE} are unset, and there is no {beside}. "
            f"{INSTALL}"
        )
    path = shutil.which(os.path.expanduser(named))
    if path is None:
        raise FileNotFoundError(f"the interpreter {named} for CALVIN is not an executable file. {INSTALL}")
    version, missing = _probe(path)
    if version < MINIMUM_PYTHON:
        found, needed = (".".join(map(str, numbers)) for numbers in (version, MINIMUM_PYTHON))
        raise FileNotFoundError(f"the interpreter {path} is Python {found}; pi_rl's workers need {needed}. {INSTALL}")
    if missing:
        raise FileNotFoundError(f"the interpreter {path} lacks the module(s) {', '.join(missing)}. {INSTALL}")
    return path


def _probe(python: str) -> tuple[tuple[int, ...], list[str]]:
    """Version of an interpreter and those of `REQUIRED_MODULES` that it does not find."""
    code = (
        "import importlib.util, json, sys; "
        "print(json.dumps([sys.version_info[:3], [m for m in sys.argv[1:] if importlib.util.find_spec(m) is None]]))"
    )
    try:
        done = subprocess.run(
            [python, "-c", code, *REQUIRED_MODULES],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=True,
        )
        version, missing = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        words = str(getattr(error, "stderr", "") or error).strip().splitlines() or ["no message"]
        raise FileNotFoundError(f"the interpreter {python} for CALVIN does not run ({words[-1]}). {INSTALL}") from None
    return tuple(version), missing
