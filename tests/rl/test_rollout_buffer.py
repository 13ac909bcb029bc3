from dataclasses import replace

import pytest
import torch

from pi_rl.rl.buffer import RolloutBuffer, minibatch_permutations

N, K, H, D = 11, 4, 3, 2


class Prefixes:
    """A prefix store whose prefixes are the sample numbers."""

    def __init__(self, size: int = N) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, indices: torch.Tensor) -> list[int]:
        return indices.tolist()


def make_buffer(**changes) -> RolloutBuffer[list[int]]:
    numbers = torch.arange(N, dtype=torch.float32)
    fields = {
        "x": numbers[:, None, None, None].expand(N, K + 1, H, D).contiguous(),
        "step_index": torch.arange(N) % K,
        "log_prob": numbers + 100,
        "values": numbers + 200,
        "advantages": numbers + 300,
        "returns": numbers + 400,
        "prefix": Prefixes(),
    }
    return RolloutBuffer(**(fields | changes))


def test_minibatch_takes_the_same_rows_of_every_field() -> None:
    indices = torch.tensor([7, 0, 3])
    batch = make_buffer().minibatch(indices, device="cpu")
    assert len(batch) == 3
    assert batch.x.shape == (3, K + 1, H, D)
    assert batch.x[:, 0, 0, 0].tolist() == [7, 0, 3]
    assert batch.step_index is not None
    assert batch.step_index.tolist() == [3, 0, 3]
    assert batch.log_prob.tolist() == [107, 100, 103]
    assert batch.values.tolist() == [207, 200, 203]
    assert batch.advantages.tolist() == [307, 300, 303]
    assert batch.returns.tolist() == [407, 400, 403]
    assert batch.prefix == [7, 0, 3]


def test_minibatch_is_a_copy_and_step_index_is_optional() -> None:
    buffer = make_buffer(step_index=None)
    batch = buffer.minibatch(torch.tensor([1, 2]))
    assert batch.step_index is None
    batch.x.zero_()
    assert buffer.x[1, 0, 0, 0] == 1
    assert len(buffer) == N


def test_buffer_rejects_fields_of_another_length() -> None:
    for changes in (
        {"values": torch.zeros(N - 1)},
        {"log_prob": torch.zeros(N, 1)},
        {"prefix": Prefixes(N + 1)},
        {"x": torch.zeros(N, K + 1, H)},
        {"step_index": torch.zeros(2, dtype=torch.int64)},
    ):
        with pytest.raises(ValueError, match="must all be"):
            make_buffer(**changes)
    with pytest.raises(ValueError, match="int64"):
        make_buffer().minibatch(torch.ones(N, dtype=torch.bool))
    assert len(replace(make_buffer(), advantages=torch.zeros(N))) == N


@pytest.mark.parametrize(("n", "minibatches"), [(12, 4), (13, 4), (7, 7), (100, 3), (5, 1)])
def test_permutations_cover_every_sample_once_per_epoch(n: int, minibatches: int) -> None:
    epochs = 3
    indices = minibatch_permutations(n, epochs, minibatches, seed=0)
    assert len(indices) == epochs * minibatches
    passes = [torch.cat(indices[e * minibatches : (e + 1) * minibatches]) for e in range(epochs)]
    for order in passes:
        assert order.dtype == torch.int64
        assert sorted(order.tolist()) == list(range(n))
    assert len({tuple(order.tolist()) for order in passes}) == epochs
    sizes = {len(part) for part in indices}
    assert max(sizes) - min(sizes) <= 1


def test_permutations_depend_on_the_seed_alone() -> None:
    first = minibatch_permutations(50, 2, 4, seed=3)
    torch.manual_seed(99)
    again = minibatch_permutations(50, 2, 4, seed=3)
    other = minibatch_permutations(50, 2, 4, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    # and leave the global generator alone
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    minibatch_permutations(50, 2, 4, seed=3)
    assert torch.equal(torch.rand(3), expected)


def test_permutations_reject() -> None:
    with pytest.raises(ValueError, match="3 samples cannot fill minibatches=4"):
        minibatch_permutations(3, 1, 4, seed=0)
    with pytest.raises(ValueError, match="update_epochs=0"):
        minibatch_permutations(3, 0, 1, seed=0)
