"""Pushing policies with the real Hub client to a Hub on the loopback interface."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from pi_rl.hub import push as push_module
from pi_rl.hub.push import check_repo_id, push_folder
from pi_rl.hub.push_contents import policy_contents

REPO = "user/policy"


@pytest.fixture
def folder(small_pi0_folder, tmp_path):
    """A copy of a small policy, which tests may change."""
    return Path(shutil.copytree(small_pi0_folder, tmp_path / "run" / "policy"))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Repetitions as many as ever, but at once."""
    monkeypatch.setattr(push_module, "WAITS_S", (0.01,) * len(push_module.WAITS_S))
    for name in ("_http_backoff_base",):
        defaults = getattr(__import__("huggingface_hub.utils._http", fromlist=[name]), name).__kwdefaults__
        monkeypatch.setitem(defaults, "base_wait_time", 0.01)
        monkeypatch.setitem(defaults, "max_wait_time", 0.02)


def push(folder, **options):
    outcome = push_folder(folder, REPO, **options)
    assert outcome.error is None, outcome.error
    return outcome


def test_upload_creates_the_repository_and_holds_the_policy(hub_here, folder):
    outcome = push(folder, message="First")
    held = hub_here.repos[REPO].files()
    assert set(outcome.files) == set(held) - {".gitattributes"}
    for name in ("config.json", "model.safetensors", "policy_preprocessor.json", "tokenizer.json", "README.md"):
        assert name in held
    assert held["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert outcome.url == f"{hub_here.address}/{REPO}"
    assert outcome.commit == hub_here.repos[REPO].branches["main"]
    assert outcome.changed and hub_here.repos[REPO].messages == ["initial commit", "First"]
    assert ModelCard(held["README.md"].decode()).data.library_name == "lerobot"


def test_second_push_sends_nothing(hub_here, folder):
    push(folder)
    hub_here.forget()
    outcome = push(folder)
    assert not outcome.changed
    assert hub_here.methods()["PUT"] == hub_here.count("POST", "/commit/") == 0
    assert len(hub_here.repos[REPO].messages) == 2


def test_only_the_changed_file_is_sent(hub_here, folder):
    push(folder)
    hub_here.forget()
    (folder / "before_after.mp4").write_bytes(b"film")
    assert push(folder).changed
    assert hub_here.methods()["PUT"] == 1
