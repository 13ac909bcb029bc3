"""Every tier gives the same rows, read ahead or not, and nothing that was given changes afterwards."""

import gc
import resource
import threading
from pathlib import Path

import pytest
import torch

from pi_rl.policies.flow_policy import Prefix
from pi_rl.policies.observation_store import ObservationStore
from pi_rl.policies.prefix_cache import PrefixStore
from pi_rl.policies.row_memory import TIERS, allocate
from pi_rl.policies.row_store import RowStore


def prefix(samples, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return Prefix(
        kv=torch.randn(2, 2, samples, 1, 5, 4, generator=generator).to(dtype),
        pad_mask=torch.rand(samples, 5, generator=generator) > 0.3,
        pooled=torch.randn(samples, 6, generator=generator),
        state=None,
    )


def observations(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (samples, 3, 8, 8), generator=generator).float() / 255.0,
        "state": torch.randn(samples, 3, generator=generator),
    }


def assert_same(a, b):
    assert dict(a.tensors()).keys() == dict(b.tensors()).keys()
    for name, tensor in a.tensors():
        assert tensor.dtype == getattr(b, name).dtype
        assert torch.equal(tensor, getattr(b, name)), name


@pytest.fixture(params=TIERS)
def tier(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity", [0, 4, 100])
def test_every_tier_gives_the_same_rows_with_and_without_reading_ahead(tier, capacity, dtype, tmp_path):
    store = PrefixStore(tier, capacity=capacity, folder=tmp_path)
    pieces = [prefix(3, seed, dtype) for seed in range(5)]
    whole = Prefix.cat(pieces)
    for _ in range(2):  # the second time in memory that is there
        for piece in pieces:
            store.append(piece)
        memory = store.nbytes
        wanted = [torch.tensor(rows, dtype=torch.int64) for rows in ([14, 0, 7, 7], [3], [], [0, 1, 2, 3, 4, 5])]
        for rows in wanted:
            assert_same(store[rows], whole.index(rows))
        for rows in wanted:
            store.prefetch(rows)
            assert_same(store[rows], whole.index(rows))
        store.prefetch(wanted[0])
        assert_same(store[wanted[1]], whole.index(wanted[1]))  # other rows than announced
        store.prefetch(wanted[0])
        store.prefetch(wanted[3])
        assert_same(store[wanted[3]], whole.index(wanted[3]))
        store.clear()
        assert store.nbytes == memory
    store.close()
    assert (store.nbytes, len(store)) == (0, 0)
    assert store.append(pieces[0]).tolist() == [0, 1, 2]
    assert_same(store[torch.arange(3)], pieces[0])


def test_observations_lie_in_every_tier(tier, tmp_path):
    store = ObservationStore(2, tier, folder=tmp_path)
    first, second = observations(2, 0), observations(3, 1)
    store.append(first)
    second["image"][0, 0, 0, 0] += 1e-3  # no byte any more: what is stored is converted
    store.append(second)
    rows = torch.tensor([4, 0, 2])
    store.prefetch(rows)
    got = store[rows]
    for name in first:
        assert torch.equal(got[name], torch.cat([first[name], second[name]])[rows]), name
    store.close()
    store.append(first)
    assert torch.equal(store[torch.arange(2)]["image"], first["image"])


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_what_autograd_still_needs_is_not_overwritten(tier, tmp_path):
    """Gradients of four graphs that are kept while the store goes on reading ahead, against stored tensors."""
    store = PrefixStore(tier, folder=tmp_path)
    whole = prefix(16)
    store.append(whole)
    batches = torch.randperm(16).split(4)
    weight = torch.randn(4, requires_grad=True)
    losses = []
    store.prefetch(batches[0])
    for i, rows in enumerate(batches):
        taken = store[rows]
        store.prefetch(batches[(i + 1) % len(batches)])
        losses.append((taken.kv.contiguous() * weight).sin().sum() * (i + 1))
    store.clear()
    store.append(prefix(16, seed=1))
    (got,) = torch.autograd.grad(sum(losses), weight)
    expected = sum(
        (whole.index(rows).kv.contiguous() * weight).sin().sum() * (i + 1) for i, rows in enumerate(batches)
    )
    assert torch.equal(got, torch.autograd.grad(expected, weight)[0])


def test_rows_appended_after_an_announcement_do_not_reach_into_it(tmp_path):
    store = PrefixStore("disk", folder=tmp_path, capacity=1)
    store.append(prefix(4))
    store.prefetch(torch.tensor([3]))
    store.append(prefix(40, seed=1))  # moves the rows to a larger file
    assert_same(store[torch.tensor([3, 4])], Prefix.cat([prefix(4), prefix(40, seed=1)]).index(torch.tensor([3, 4])))


class Breaking(RowStore[dict[str, torch.Tensor]]):
    """Fails while it reads on the thread."""

    def append(self, rows):
        return self._store({"rows": rows})

    def _fetch(self, indices):
        if threading.current_thread() is not threading.main_thread():
            raise OSError("the disk is gone")
        return super()._fetch(indices)

    def _answer(self, rows):
        return rows


@pytest.mark.parametrize("use", [lambda s: s[torch.tensor([0])], lambda s: s[torch.tensor([1])], RowStore.clear])
def test_an_error_of_the_thread_reaches_the_caller_once(use):
    store = Breaking("host")
    store.append(torch.arange(3.0))
    store.prefetch(torch.tensor([0]))
    with pytest.raises(OSError, match="the disk is gone"):
        use(store)
    assert store[torch.tensor([2])]["rows"].tolist() == [2.0]
    with pytest.raises(IndexError, match="outside the 3 stored rows"):
        store.prefetch(torch.tensor([3]))


def test_the_thread_ends_with_the_store():
    def alive():
        return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]

    before = set(alive())
    closed, dropped = PrefixStore("host"), PrefixStore("host")
    for store in (closed, dropped):
        store.append(prefix(2))
        store.prefetch(torch.tensor([0]))
        assert_same(store[torch.tensor([0])], prefix(2).index(torch.tensor([0])))
    started = set(alive()) - before
    assert len(started) == 2
    closed.close()
    del dropped, store
    gc.collect()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_the_device_needs_no_thread():
    store = PrefixStore("device")
    store.append(prefix(2))
    before = threading.active_count()
    store.prefetch(torch.tensor([1]))
    assert threading.active_count() == before


def test_the_file_has_no_name_and_its_space_comes_back(tmp_path):
    """Without a name nothing is left behind, however a process ends."""
    folder = tmp_path / "below" / "output"
    rows = allocate("disk", (1000, 1000), torch.zeros(1), folder)
    assert list(folder.iterdir()) == []
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert len(mapped) == 1
    rows.fill_(3.0)
    assert float(rows[999, 999]) == 3.0
    del rows
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert allocate("disk", (4, 0), torch.zeros(1), folder).shape == (4, 0)


def test_a_disk_without_room_says_what_to_do(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = PrefixStore("disk", capacity=10_000, folder=tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(RuntimeError, match=r"no room for 0\.003 GB.*prefix_storage_dir"):
            store.append(prefix(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="storage='shelf' is unknown"):
        PrefixStore("shelf")
    with pytest.raises(ValueError, match="storage='shelf' is unknown"):
        allocate("shelf", (1,), torch.zeros(1))
    with pytest.raises(ValueError, match="storage='disk' needs a folder"):
        PrefixStore("disk")
    with pytest.raises(ValueError, match="storage='disk' needs a folder"):
        allocate("disk", (1,), torch.zeros(1))
    store = PrefixStore()
    store.append(prefix(2))
    with pytest.raises(ValueError, match="precision"):
        store.append(prefix(2, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [4, 1 << 16])  # gathered in a staging buffer; copied row by row
def test_a_gpu_gets_the_same_rows(tier, width, tmp_path):
    store = PrefixStore(tier, folder=tmp_path)
    whole = prefix(16)
    whole.kv = torch.randn(2, 2, 16, 1, 5, width)
    on_gpu = whole.to("cuda")
    store.append(on_gpu)
    for rows in torch.arange(16).repeat(8)[torch.randperm(128)].split(7):
        store.prefetch(rows)
        got = store[rows]
        assert got.kv.is_cuda
        assert_same(got.to("cpu"), whole.index(rows))
