"""Starts workers under this interpreter or under another one, which must not see this one's packages."""

import os
import sys
from pathlib import Path

WORKER = "pi_rl.envs.worker"
_PACKAGE = Path(__file__).resolve().parents[1]
_START = """
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("pi_rl", sys.argv.pop(1))
package = sys.modules["pi_rl"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def worker_command(python: str) -> list[str]:
    """Returns the command that starts a worker; its own arguments follow.

    Another interpreter gets pi_rl by the path of its `__init__.py`: the folder that holds an installed pi_rl holds all
    other packages too, compiled for this interpreter.

    Args:
        python: Path of the interpreter, Python 3.11 or later, with numpy.
    """
    if python == sys.executable:
        return [python, "-P", "-m", WORKER]
    return [python, "-P", "-c", _START, str(_PACKAGE / "__init__.py"), WORKER]


def worker_environment(python: str, environment: dict[str, str]) -> dict[str, str]:
    """Returns the variables for a worker under an interpreter.

    Args:
        python: Path of the interpreter.
        environment: What a worker under this interpreter gets, as `pi_rl.envs.renderer.child_environment` returns it.
    """
    if python == sys.executable:
        return environment
    others = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    inherited = os.environ.get("PYTHONPATH")
    return {**others, "PYTHONPATH": inherited} if inherited else others
