"""`auto` by faked budgets, agreement between processes, refusals."""

import pytest
import torch

from pi_rl.policies import input_storage
from pi_rl.policies.flow_policy import Prefix
from pi_rl.policies.input_storage import InputStorage, bytes_per_observation
from pi_rl.policies.observation_store import ObservationStore
from pi_rl.policies.prefix_cache import PrefixStore
from pi_rl.policies.storage_budget import Budget

MB = 10**6
CAPACITY = 100


def prefix(samples=2):
    return Prefix(
        kv=torch.zeros(2, 2, samples, 1, 10_000, 16, dtype=torch.bfloat16),
        pad_mask=torch.ones(samples, 10_000, dtype=torch.bool),
        pooled=torch.zeros(samples, 8),
    )


def batch(samples=2):
    return {"image": torch.zeros(samples, 3, 100, 100), "state": torch.zeros(samples, 4), "task": ["go"] * samples}


PREFIXES = CAPACITY * (2 * 2 * 10_000 * 16 * 2 + 10_000 + 32)  # 129 MB
OBSERVATIONS = CAPACITY * (30_000 + 16)  # 3 MB


@pytest.fixture
def free(monkeypatch):
    """Sets what is free, in bytes of device, host, disk."""

    def set_free(*budget):
        monkeypatch.setattr(InputStorage, "_budget", lambda self, device: Budget(*budget))

    return set_free


def opened(tmp_path, storage="auto", **options):
    said = []
    store = InputStorage(storage, folder=tmp_path, report=lambda *told: said.append(told), **options).open(
        batch(), prefix(), CAPACITY
    )
    return store, said


def test_sizes_are_those_of_stored_rows(tmp_path):
    assert CAPACITY * bytes_per_observation(prefix()) == PREFIXES
    assert CAPACITY * bytes_per_observation(batch()) == OBSERVATIONS
    for store, inputs in ((PrefixStore(capacity=7), prefix()), (ObservationStore(7), batch())):
        store.append(inputs)
        assert store.nbytes == 7 * bytes_per_observation(inputs)


@pytest.mark.parametrize(
    ("budget", "tier"),
    [
        ((PREFIXES, 0, 0), "device"),
        ((PREFIXES - 1, PREFIXES, PREFIXES), "host"),
        ((0, PREFIXES - 1, PREFIXES), "disk"),
        ((OBSERVATIONS, PREFIXES - 1, PREFIXES - 1), "recompute"),
    ],
)
def test_auto_takes_the_first_tier_with_room_and_says_so(free, tmp_path, budget, tier):
    free(*budget)
    store, said = opened(tmp_path)
    if tier == "recompute":
        assert isinstance(store, ObservationStore)
        assert store.storage == "device"
    else:
        assert isinstance(store, PrefixStore)
        assert store.storage == tier
    assert store.capacity == CAPACITY
    [(chosen, line)] = said
    assert chosen == tier
    size = "0.03 MB = 3 MB" if tier == "recompute" else "1.29 MB = 129 MB"
    assert line.startswith(f"prefix store: {tier}")
    assert f"100 observations x {size}; room: device {budget[0] / MB:,.3g} MB" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("budget", "tier"),
    [
        ((OBSERVATIONS, 0, 0), "device"),
        ((0, OBSERVATIONS, 0), "host"),
        ((0, 0, OBSERVATIONS), "disk"),
        ((0, 0, 0), "host"),
    ],
)
@pytest.mark.parametrize(("storage", "live"), [("auto", True), ("recompute", True), ("recompute", False)])
def test_observations_lie_where_they_find_room(free, tmp_path, budget, tier, storage, live):
    free(*budget)
    store, said = opened(tmp_path, storage, live=live)
    assert isinstance(store, ObservationStore)
    assert store.storage == tier
    assert f"recompute (observations: {tier})" in said[0][1]


def test_the_process_with_the_least_room_decides(free, tmp_path):
    """This process has room on the device and on disk only, another one in host memory and on disk only."""
    free(PREFIXES, 0, PREFIXES)
    other = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    store, _ = opened(tmp_path, agree=lambda lacks: torch.maximum(lacks, other))
    assert store.storage == "disk"
    nowhere = torch.ones(2, 3)
    store, _ = opened(tmp_path, agree=lambda lacks: torch.maximum(lacks, nowhere))
    assert isinstance(store, ObservationStore)


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
def test_what_is_asked_for_is_done_without_measuring(tmp_path, monkeypatch, storage):
    monkeypatch.setattr(input_storage, "measure_budget", None)
    store, said = opened(tmp_path, storage)
    assert isinstance(store, PrefixStore)
    assert store.storage == storage
    assert said == []


def test_without_a_folder_the_disk_is_no_choice(free):
    free(0, 0, PREFIXES)
    assert isinstance(InputStorage("auto").open(batch(), prefix(), CAPACITY), ObservationStore)


def test_stored_prefixes_of_a_trained_vlm_are_refused():
    for storage in ("device", "host", "disk"):
        with pytest.raises(ValueError, match=f"prefix_storage='{storage}'.*use auto or recompute"):
            InputStorage(storage, live=True)
    with pytest.raises(ValueError, match="prefix_storage='shelf' is unknown"):
        InputStorage("shelf")
