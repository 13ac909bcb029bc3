"""The real Hub client, in this process or in one of its own, against a loopback Hub."""

import os
import subprocess
import sys
from contextlib import contextmanager

HF = os.path.join(os.path.dirname(sys.executable), "hf")


def client_environment(hub, home, token="write"):
    """Environment of a user of this Hub; `hf_xet` would go around any server that does not offer Xet."""
    values = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    values |= {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "HF_LEROBOT_HOME": str(home / "lerobot"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    if token:
        values["HF_TOKEN"] = getattr(hub, f"{token}_token")
    return values


def run_client(hub, home, *words, token="write", timeout=300, cwd=None):
    """Runs a command line as a user of the Hub; gives the finished process with its output."""
    return subprocess.run(
        list(map(str, words)),
        env=client_environment(hub, home, token),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
    )


@contextmanager
def client_here(hub, home, monkeypatch, token="write"):
    """Points the client of this process, which read its environment at import, and of its children to the Hub."""
    from huggingface_hub import constants

    files = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        for name, value in client_environment(hub, home, token).items():
            patch.setenv(name, value)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        yield
