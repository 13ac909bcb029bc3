"""What is free, from faked machines."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from pi_rl.policies import storage_budget
from pi_rl.policies.storage_budget import free_host_memory, measure_budget

GB = 10**9


@pytest.fixture
def machine(monkeypatch):
    """A machine with 100 GB of free memory and 500 GB of free disk, without control groups."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GB))
    monkeypatch.setattr(storage_budget.shutil, "disk_usage", lambda place: SimpleNamespace(free=500 * GB))
    monkeypatch.setattr(storage_budget, "_group_limits", lambda *paths: [])


def test_processes_share_host_and_disk_and_the_update_has_its_reserve(machine):
    budget = measure_budget(torch.device("cpu"), Path("/nowhere/yet"), processes=4, reserve=5 * GB)
    assert budget.host == budget.device == pytest.approx(0.8 * 100 * GB / 4 - 5 * GB)
    assert budget.disk == pytest.approx(0.9 * 500 * GB / 4)
    assert measure_budget(torch.device("cpu"), Path("/"), reserve=200 * GB).device == 0


def test_a_gpu_counts_what_pytorch_holds_unused(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 14 * GB)
    budget = measure_budget(torch.device("cuda"), Path("/"), reserve=7 * GB)
    assert budget.device == pytest.approx((50 + 6 - 7 - 20) * GB)
    assert budget.host == pytest.approx(80 * GB)  # the reserve is the GPU's alone


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(f"{text}\n")


def test_the_tightest_control_group_counts_and_file_cache_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GB))
    own = tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    root = tmp_path / "cgroup"
    write(root / "outer" / "inner", memory_dot_max="max", memory_dot_current=9)
    write(root / "outer", memory_dot_max=16 * GB, memory_dot_current=10 * GB,
          memory_dot_stat=f"anon 7\ninactive_file {4 * GB}\nactive_file 1")  # fmt: skip
    write(root, memory_dot_max=64 * GB, memory_dot_current=1 * GB)
    assert free_host_memory(root, own) == 10 * GB
    own.write_text("0::/not/visible/here\n")  # a container sees its own group as the root
    assert free_host_memory(root, own) == 63 * GB
    assert free_host_memory(tmp_path / "none", tmp_path / "none") == 100 * GB


def test_version_1_of_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GB))
    own = tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    write(tmp_path / "cgroup" / "memory" / "job", memory_dot_limit_in_bytes=8 * GB,
          memory_dot_usage_in_bytes=3 * GB, memory_dot_stat=f"total_inactive_file {GB}")  # fmt: skip
    assert free_host_memory(tmp_path / "cgroup", own) == 6 * GB


def test_this_machine_has_some_memory():
    assert 0 < free_host_memory() <= psutil.virtual_memory().total
