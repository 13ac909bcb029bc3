from dataclasses import replace

import pytest
import torch

from pi_rl.rl.buffer import RolloutBuffer, minibatch_permutations

N, S, U, K, H, D = 11, 2, 3, 4, 3, 2


class Inputs:
    """A store whose inputs are the chunk numbers."""

    def __init__(self, size: int = N) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, rows: torch.Tensor) -> list[int]:
        return rows.tolist()


def make_buffer(**changes) -> RolloutBuffer[list[int]]:
    chunks = torch.arange(N, dtype=torch.float32)
    samples = torch.arange(N * S, dtype=torch.float32).view(N, S)
    fields = {
        "x": chunks[:, None, None, None].expand(N, K + 1, H, D).contiguous(),
        "step_index": torch.arange(S).expand(N, S),
        "log_prob": (samples + 100)[:, :, None].expand(N, S, U),
        "values": samples + 200,
        "advantages": samples + 300,
        "returns": samples + 400,
        "critic_input": (10 * chunks[:, None] + torch.arange(K))[:, :, None],
        "inputs": Inputs(),
    }
    return RolloutBuffer(**(fields | changes))


def test_a_minibatch_takes_samples_and_their_chunks() -> None:
    batch = make_buffer().minibatch(torch.tensor([15, 0, 7]), device="cpu")
    assert len(batch) == 3
    assert batch.x.shape == (3, K + 1, H, D)
    assert batch.x[:, 0, 0, 0].tolist() == [7, 0, 3]
    assert batch.step_index.tolist() == [1, 0, 1]
    assert batch.log_prob.shape == (3, U)
    assert batch.log_prob[:, 0].tolist() == [115, 100, 107]
    assert batch.values.tolist() == [215, 200, 207]
    assert batch.advantages.tolist() == [315, 300, 307]
    assert batch.returns.tolist() == [415, 400, 407]
    assert batch.critic_input.shape == (3, K, 1)
    assert batch.inputs == [7, 0, 3]
    per_step = make_buffer(critic_per_step=True).minibatch(torch.tensor([15, 0, 7]))
    assert per_step.critic_input.flatten().tolist() == [71, 0, 31]


def test_a_minibatch_is_a_copy_and_some_fields_are_optional() -> None:
    buffer = make_buffer(step_index=None, values=None, returns=None, critic_input=None)
    batch = buffer.minibatch(torch.tensor([2, 5]))
    assert batch.step_index is batch.values is batch.returns is batch.critic_input is None
    batch.x.zero_()
    assert buffer.x[1, 0, 0, 0] == 1
    assert len(buffer) == N * S


def test_a_buffer_rejects_fields_of_another_length() -> None:
    for changes in (
        {"values": torch.zeros(N - 1, S)},
        {"log_prob": torch.zeros(N, 1)},
        {"inputs": Inputs(N + 1)},
        {"x": torch.zeros(N, K + 1, H)},
        {"step_index": torch.zeros(N, dtype=torch.int64)},
        {"critic_input": torch.zeros(N * S, 1, 1)},
    ):
        with pytest.raises(ValueError, match="must be"):
            make_buffer(**changes)
    with pytest.raises(ValueError, match="int64"):
        make_buffer().minibatch(torch.ones(N, dtype=torch.bool))
    assert len(replace(make_buffer(), advantages=torch.zeros(N, S))) == N * S


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


def test_few_samples_leave_some_minibatches_empty() -> None:
    assert [len(part) for part in minibatch_permutations(3, 1, 4, seed=0)] == [1, 1, 1, 0]
    assert [len(part) for part in minibatch_permutations(0, 2, 2, seed=0)] == [0] * 4


def test_permutations_reject() -> None:
    with pytest.raises(ValueError, match="n=-1"):
        minibatch_permutations(-1, 1, 4, seed=0)
    with pytest.raises(ValueError, match="update_epochs=0"):
        minibatch_permutations(3, 0, 1, seed=0)
