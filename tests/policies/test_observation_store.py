"""Observations come back bit for bit, and images take a byte per value where that is enough."""

import pytest
import torch

from pi_rl.policies.observation_store import ObservationStore


def pixels(samples, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (samples, 3, size, size), generator=generator).float() / 255.0


def make_batch(samples, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    return {
        "observation.image": pixels(samples, seed=seed),
        "observation.state": torch.randn(samples, 4, generator=generator),
        "observation.language.tokens": torch.randint(0, 100, (samples, 8), generator=generator),
        "observation.language.attention_mask": torch.rand(samples, 8, generator=generator) > 0.5,
        "task": ["press"] * samples,
        "action": None,
        **changes,
    }


def assert_same(got, batch, rows):
    assert set(got) == {name for name, value in batch.items() if isinstance(value, torch.Tensor)}
    for name, value in got.items():
        assert value.dtype == batch[name].dtype, name
        assert torch.equal(value, batch[name][rows]), name


def test_rows_come_back_in_any_order():
    store, first, second = ObservationStore(capacity=7), make_batch(4, seed=0), make_batch(3, seed=1)
    assert store.append(first).tolist() == [0, 1, 2, 3]
    assert store.append(second).tolist() == [4, 5, 6]
    assert len(store) == 7
    both = {name: torch.cat([first[name], second[name]]) for name in first if isinstance(first[name], torch.Tensor)}
    rows = torch.tensor([6, 0, 3, 3, 5])
    assert_same(store[rows], both, rows)
    assert len(store[torch.tensor([], dtype=torch.int64)]["observation.state"]) == 0


def test_every_level_of_a_byte_is_exact():
    image = (torch.arange(256).float() / 255.0).expand(2, 3, 4, 256)
    store = ObservationStore(2)
    store.append({"image": image})
    assert store.nbytes == image.numel()
    assert torch.equal(store[torch.tensor([1, 0])]["image"], image)


@pytest.mark.parametrize("change", [0.3 / 255.0, 2.0, -0.01])
def test_other_images_are_kept_in_full(change):
    batch = make_batch(3)
    batch["observation.image"][1, 2, 3, 4] += change
    store = ObservationStore(3)
    store.append(batch)
    assert store.nbytes > batch["observation.image"].nbytes
    assert_same(store[torch.arange(3)], batch, torch.arange(3))


def test_an_image_that_does_not_fit_a_byte_may_come_later():
    first, second, third = make_batch(2, seed=0), make_batch(2, seed=1), make_batch(2, seed=2)
    second["observation.image"] += 1e-3
    store = ObservationStore(2)
    for batch in (first, second, third):
        store.append(batch)
    for start, batch in zip((0, 2, 4), (first, second, third), strict=True):
        assert_same(store[torch.arange(start, start + 2)], batch, torch.arange(2))


@pytest.mark.parametrize("capacity", [0, 1, 100])
def test_it_grows_and_keeps_its_memory(capacity):
    store, batches = ObservationStore(capacity), [make_batch(3, seed=seed) for seed in range(5)]
    for _ in range(2):
        for batch in batches:
            store.append(batch)
        assert len(store) == 15
        for i, batch in enumerate(batches):
            assert_same(store[torch.arange(3 * i, 3 * i + 3)], batch, torch.arange(3))
        used = store.nbytes
        store.clear()
        assert len(store) == 0
        assert store.nbytes == used


def test_answers_are_copies():
    store, batch = ObservationStore(2), make_batch(2)
    store.append(batch)
    for value in store[torch.tensor([0])].values():
        value.zero_()
    batch_before = make_batch(2)
    batch["observation.state"].zero_()
    assert_same(store[torch.arange(2)], batch_before, torch.arange(2))


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="capacity=-1"):
        ObservationStore(-1)
    store = ObservationStore(2)
    with pytest.raises(ValueError, match="one row per observation"):
        store.append({"task": ["a"]})
    with pytest.raises(ValueError, match="one row per observation"):
        store.append({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="one row per observation"):
        store.append({"a": torch.zeros(2, 3), "reward": torch.tensor(0.0)})
    store.append(make_batch(2))
    for change in (
        {"observation.image": pixels(2, size=16)},
        {"observation.state": torch.zeros(2, 4, dtype=torch.float64)},
        {"observation.images.wrist": pixels(2)},
    ):
        with pytest.raises(ValueError, match="The store holds rows of"):
            store.append(make_batch(2, **change))
    assert len(store) == 2
    for wrong in ([2], [-1]):
        with pytest.raises(IndexError, match="outside the 2 stored rows"):
            store[torch.tensor(wrong)]


def test_a_policy_encodes_the_same_prefix(policy, loaded, toolbox):
    raw = toolbox.observations(4)
    for camera in toolbox.cameras:
        raw[camera] = pixels(4, size=40)
    batch = loaded.preprocessor(raw)
    store = ObservationStore(4)
    rows = store.append(batch)
    floats = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
    assert store.nbytes < floats / 3
    for (name, a), (_, b) in zip(
        policy.encode_prefix(store[rows]).tensors(), policy.encode_prefix(batch).tensors(), strict=True
    ):
        assert torch.equal(a, b), name
