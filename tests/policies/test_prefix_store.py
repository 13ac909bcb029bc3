"""The store returns exactly what was appended."""

import pytest
import torch

from pi_rl.policies.flow_policy import Prefix
from pi_rl.policies.prefix_cache import PrefixStore


def prefix(samples, seed=0, tokens=5, state=True):
    generator = torch.Generator().manual_seed(seed)
    return Prefix(
        kv=torch.randn(2, 2, samples, 1, tokens, 4, generator=generator),
        pad_mask=torch.rand(samples, tokens, generator=generator) > 0.3,
        pooled=torch.randn(samples, 6, generator=generator),
        state=torch.randn(samples, 3, generator=generator) if state else None,
    )


def assert_same(a, b):
    assert dict(a.tensors()).keys() == dict(b.tensors()).keys()
    for name, tensor in a.tensors():
        assert torch.equal(tensor, getattr(b, name)), name


def test_only_valid_rows_and_reuse_of_memory():
    store, piece = PrefixStore(), prefix(4, state=False)
    store.append(piece, torch.tensor([True, False, True, False]))
    assert_same(store[torch.arange(2)], piece.index(torch.tensor([0, 2])))
    allocated = store.nbytes
    store.clear()
    assert len(store) == 0
    store.append(piece, torch.tensor([3]))
    assert store.nbytes == allocated
    assert_same(store[torch.tensor([0])], piece.index(torch.tensor([3])))


def test_stored_rows_are_copies():
    store, piece = PrefixStore(), prefix(2)
    store.append(piece)
    expected = piece.index(torch.arange(2))
    piece.kv.zero_()
    assert_same(store[torch.arange(2)], expected)


def test_errors():
    store = PrefixStore()
    store.append(prefix(2))
    with pytest.raises(IndexError, match="2 stored"):
        store[torch.tensor([2])]
    with pytest.raises(ValueError, match="same cameras"):
        store.append(prefix(2, tokens=6))
    with pytest.raises(ValueError, match="capacity"):
        PrefixStore(capacity=-1)
    with pytest.raises(ValueError, match="token counts"):
        Prefix.cat([prefix(1), prefix(1, tokens=6)])
    with pytest.raises(ValueError, match="got pieces with fields"):
        Prefix.cat([prefix(1), prefix(1, state=False)])
    with pytest.raises(ValueError, match="no pieces"):
        Prefix.cat([])
