"""`pi-rl env`: what a report of a problem needs to say about the machine."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path
from shutil import disk_usage
from typing import Any

import psutil

from pi_rl.__about__ import __version__, package_versions
from pi_rl.cli.parser import CommandParser

PROBE_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 10.0
SIMULATORS = {
    "MetaWorld": ("metaworld", "mujoco"),
    "LIBERO": ("hf-libero", "robosuite"),
    "ManiSkill": ("mani_skill", "sapien"),
}
"""Benchmark to the distributions it needs."""
DASHBOARDS = ("tensorboard", "trackio", "wandb")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "MUJOCO_GL", "OMP_NUM_THREADS", "PYOPENGL_PLATFORM")
MISSING = "not installed"
_DESCRIPTION = """\
Prints what a report of a problem needs: versions, machine, GPUs, simulators, which renderers really draw a frame, and
the Hugging Face set-up. Nothing is sent anywhere, and neither tokens nor user names are shown. Takes some seconds."""
_EXAMPLES = ("pi-rl env               ready to paste", "pi-rl env --json        for programs")


def run(argv: Sequence[str]) -> int:
    """Runs the subcommand; returns the exit code.

    Raises:
        UserError: An option is unknown.
    """
    parser = CommandParser("env", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse(argv)
    found = describe()
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else as_text(found))
    return 0


def describe() -> dict[str, dict[str, Any]]:
    """Topics to facts by name; what is not there is None, or says so."""
    with ThreadPoolExecutor() as pool:
        problems = {name: pool.submit(probe, name, PROBE_TIMEOUT_S) for name, probe in _renderers().items()}
        topics = {
            "pi_rl": {"version": __version__, "commit": _commit()},
            "machine": _machine(),
            "packages": {name: text for name, text in package_versions().items() if name not in ("pi_rl", "platform")},
            "torch": _torch(),
            "simulators": _simulators(),
            "dashboards": {name: _version(name) for name in DASHBOARDS},
        }
        topics["renderers"] = {name: _drawing(answer.result()) for name, answer in problems.items()}
    return {
        **topics,
        "hugging face": _hugging_face(),
        "accelerate": _accelerate(),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def as_text(topics: Mapping[str, Mapping[str, Any]]) -> str:
    """The facts as a fenced block for an issue.

    Args:
        topics: As :func:`describe` returns them.
    """
    lines = []
    for topic, facts in topics.items():
        width = max(map(len, facts), default=0)
        lines.append(topic)
        lines += [f"  {name:<{width}}  {_shown(value)}" for name, value in facts.items()]
    return "\n".join(["```text", *lines, "```"])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)


def _output(*command: str, folder: Path | None = None) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    """The commit of a checkout, and whether files differ from it; None for an installed package."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    commit = _output("git", "rev-parse", "--short=12", "HEAD", folder=folder)
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", folder=folder)
    return f"{commit} with changes" if commit and changed else commit


def _machine() -> dict[str, Any]:
    release = platform.freedesktop_os_release() if platform.system() == "Linux" else {}
    name = release.get("PRETTY_NAME", platform.system())
    memory = psutil.virtual_memory()
    return {
        "system": f"{name}, kernel {platform.release()}, {platform.machine()}",
        "processor": _processor(),
        "cores": {"available": len(os.sched_getaffinity(0)), "in all": os.cpu_count()},
        "memory": {"total": _gigabytes(memory.total), "available": _gigabytes(memory.available)},
        "gpus": _gpus(),
    }


def _processor() -> str | None:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or None


def _gpus() -> list[str]:
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader") or ""
    rows = [[entry.strip() for entry in line.split(",")] for line in listed.splitlines() if line.strip()]
    return [f"{name} ({memory}, driver {driver})" for name, memory, driver in rows]


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "built for CUDA": torch.version.cuda,
        "CUDA works": torch.cuda.is_available(),
        "bfloat16 on the GPU": torch.cuda.is_bf16_supported() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return MISSING


def _simulators() -> dict[str, Any]:
    return {benchmark: {name: _version(name) for name in needed} for benchmark, needed in SIMULATORS.items()}


def _renderers() -> dict[str, Callable[[str, float], str | None]]:
    """Renderer to what draws a frame with it; Vulkan where SAPIEN, which needs it, is installed."""
    from pi_rl.envs import renderer, vulkan

    found: dict[str, Callable[[str, float], str | None]] = dict.fromkeys(renderer.RENDERERS, renderer.probe_renderer)
    if util.find_spec("sapien") is not None:
        found["vulkan"] = lambda _, timeout_s: vulkan.probe("cpu", timeout_s)
    return found


def _drawing(problem: str | None) -> str:
    if problem is None:
        return "draws"
    from pi_rl.hub.push_contents import without_machine  # slow to import

    return f"does not draw: {without_machine(problem, [str(Path.home())])}"


def _hugging_face() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        "cache": _without_user_names(cache),
        "free disk": _gigabytes(disk_usage(existing).free),
        "HF_ENDPOINT set": "HF_ENDPOINT" in os.environ,
        "logged in": get_token() is not None,
    }


def _accelerate() -> dict[str, Any]:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not Path(default_config_file).is_file():
        return {"default config": None}
    config = load_config_from_file(None)
    names = ("distributed_type", "num_machines", "num_processes", "mixed_precision", "use_cpu")
    return {"default config": {name: str(getattr(config, name, None)) for name in names}}


def _without_user_names(path: Path) -> str:
    """A path below the home folder; others often begin with a user's name, as in /scratch."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else "outside the home folder"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
