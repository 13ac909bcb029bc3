import math

import pytest
import torch
from torch.distributions import Normal

from pi_rl.flow.likelihood import (
    LIKELIHOOD_LEVELS,
    gaussian_entropy,
    gaussian_log_prob,
    masked_mean,
    masked_sum,
    reduce_to_units,
    standard_normal_log_prob,
    unit_count,
)


def test_log_prob_and_entropy_match_torch_distributions_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(8, 5, 3, generator=generator)
    std = 0.05 + torch.rand(8, 5, 3, generator=generator)
    x = mean + 2 * std * torch.randn(8, 5, 3, generator=generator)
    reference = Normal(mean.double(), std.double())
    got = gaussian_log_prob(x, mean, std)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reference.log_prob(x.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gaussian_entropy(std).double(), reference.entropy(), rtol=1e-6, atol=1e-6)
    standard = Normal(torch.zeros((), dtype=torch.float64), 1.0).log_prob(x.double())
    torch.testing.assert_close(standard_normal_log_prob(x).double(), standard, rtol=1e-6, atol=1e-6)


def test_half_precision_inputs_give_float32() -> None:
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    assert gaussian_log_prob(x, x, x).dtype == torch.float32
    assert gaussian_entropy(x).dtype == torch.float32
    assert gaussian_entropy(x)[0, 0].item() == torch.tensor(0.5 * math.log(2 * math.pi * math.e)).item()


def test_masked_reductions_ignore_what_is_outside() -> None:
    values = torch.arange(12.0).view(2, 3, 2)
    values[:, 2] = torch.nan
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    assert masked_sum(values, mask).tolist() == [0 + 2 + 3, 6 + 8 + 9]
    torch.testing.assert_close(masked_mean(values, mask), torch.tensor([5 / 3, 23 / 3]))


def test_masked_reductions_broadcast() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    per_sample = torch.tensor([2.0, 5.0]).view(2, 1, 1)
    assert masked_sum(per_sample, mask).tolist() == [6, 15]
    assert masked_mean(per_sample, mask).tolist() == [2, 5]


def test_units_add_up_to_the_chunk() -> None:
    values = torch.arange(12.0).view(2, 3, 2)
    values[:, 1] = torch.nan
    values[0, 2, 0] = torch.nan
    scored = torch.tensor([[True, True], [False, False], [False, True]])
    expected = {"chunk": [[6], [24]], "action": [[1, 5], [13, 11]], "element": [[0, 1, 5], [6, 7, 11]]}
    for level in LIKELIHOOD_LEVELS:
        got = reduce_to_units(values, scored, level)
        assert got.tolist() == expected[level]
        assert unit_count(scored, level) == got.shape[1]
        torch.testing.assert_close(got.sum(1), masked_sum(values, scored))
        # one number per sample, such as a schedule's std
        per_sample = reduce_to_units(torch.tensor([2.0, 5.0]).view(2, 1, 1), scored, level)
        assert per_sample.sum(1).tolist() == [6, 15]
    with pytest.raises(ValueError, match="choose one of chunk, action, element"):
        reduce_to_units(values, scored, "token")
