import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pi_rl.rl.losses import (
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    explained_variance_from_moments,
    explained_variance_moments,
)


def tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)


def column(*numbers: float) -> torch.Tensor:
    """Log-probs of samples with one unit, (N, 1)."""
    return torch.tensor(numbers)[:, None]


RATIOS = (1.0, 1.5, 0.5, 1.5, 0.5, 1.1)
ADVANTAGES = (2.0, 1.0, 1.0, -1.0, -1.0, -3.0)


def test_clipped_surrogate_by_hand() -> None:
    log_prob = column(*RATIOS).log().requires_grad_()
    loss, diagnostics = clipped_surrogate(log_prob, torch.zeros(6, 1), tensor(*ADVANTAGES), 0.2)
    # min(r A, clip(r) A) = 2, 1.2, .5, -1.5, -.8, -3.3
    assert loss.item() == pytest.approx(1.9 / 6, rel=1e-5)
    assert diagnostics["clip_fraction"].item() == pytest.approx(4 / 6)
    assert diagnostics["ratio_max"].item() == pytest.approx(1.5)
    assert diagnostics["ratio_mean"].item() == pytest.approx(sum(RATIOS) / 6)
    k3 = sum(r - 1 - math.log(r) for r in RATIOS) / 6
    assert diagnostics["approx_kl"].item() == pytest.approx(k3, rel=1e-5)
    assert not any(value.requires_grad for value in diagnostics.values())
    loss.backward()
    # d/dlog p of -mean(r A), and nothing where the clip is active
    expected = [-r * a / 6 for r, a in zip(RATIOS, ADVANTAGES, strict=True)]
    expected[1] = expected[4] = 0.0
    torch.testing.assert_close(log_prob.grad, column(*expected))


def test_units_share_an_advantage_and_add_up() -> None:
    log_prob = tensor(*RATIOS).log().view(3, 2).requires_grad_()
    loss, diagnostics = clipped_surrogate(log_prob, torch.zeros(3, 2), tensor(2.0, 1.0, -3.0), 0.2)
    # rows of ratios (1, 1.5), (.5, 1.5), (.5, 1.1): 2 + 2.4, .5 + 1.2, -2.4 - 3.3
    assert loss.item() == pytest.approx(-(4.4 + 1.7 - 5.7) / 3, rel=1e-5)
    assert diagnostics["clip_fraction"].item() == pytest.approx(4 / 6)
    assert diagnostics["ratio_mean"].item() == pytest.approx(sum(RATIOS) / 6)
    k3 = sum(r - 1 - math.log(r) for r in RATIOS) / 3
    assert diagnostics["approx_kl"].item() == pytest.approx(k3, rel=1e-5)
    loss.backward()
    expected = torch.tensor([[-2.0, 0.0], [-0.5, 0.0], [0.0, 3.3]]) / 3
    torch.testing.assert_close(log_prob.grad, expected)


def test_an_unchanged_policy_has_the_chunks_gradient_at_every_level() -> None:
    """At ratio 1 the gradient is that of A times the sum of the units' log-probs, however it is cut into units."""
    generator = torch.Generator().manual_seed(0)
    old, advantages = torch.randn(16, 6, generator=generator), torch.randn(16, generator=generator)
    for cut in (1, 2, 3, 6):
        parts = old.clone().requires_grad_()
        units = parts.view(16, cut, 6 // cut).sum(2)
        loss, _ = clipped_surrogate(units, units.detach(), advantages, 0.2)
        loss.backward()
        torch.testing.assert_close(parts.grad, (-advantages / 16)[:, None].expand(-1, 6))
        assert loss.item() == pytest.approx(-cut * advantages.mean().item(), rel=1e-5)


def test_the_divergence_of_independent_units_adds_up() -> None:
    old, new = Normal(0.0, 1.0), Normal(0.05, 0.97)
    torch.manual_seed(0)
    x = old.sample((100_000, 4))
    units = clipped_surrogate(new.log_prob(x), old.log_prob(x), torch.ones(len(x)), 0.2)[1]["approx_kl"]
    joint = clipped_surrogate(
        new.log_prob(x).sum(1, keepdim=True), old.log_prob(x).sum(1, keepdim=True), torch.ones(len(x)), 0.2
    )[1]["approx_kl"]
    exact = 4 * kl_divergence(old, new).item()
    assert units.item() == pytest.approx(exact, rel=0.03)
    assert joint.item() == pytest.approx(exact, rel=0.03)


def test_asymmetric_clip() -> None:
    log_prob = column(*RATIOS).log()
    loss, diagnostics = clipped_surrogate(log_prob, torch.zeros(6, 1), tensor(*ADVANTAGES), 0.6, 0.05)
    # only ratios above 1.05 are clipped: 2, 1.05, .5, -1.5, -.5, -3.3
    assert loss.item() == pytest.approx(1.75 / 6, rel=1e-5)
    assert diagnostics["clip_fraction"].item() == pytest.approx(3 / 6)


def test_unchanged_policy() -> None:
    log_prob = torch.randn(32, 1, generator=torch.Generator().manual_seed(0)) * 100
    loss, diagnostics = clipped_surrogate(log_prob, log_prob.clone(), torch.ones(32), 0.2)
    assert loss == -1
    assert diagnostics["approx_kl"] == diagnostics["clip_fraction"] == 0
    assert diagnostics["ratio_mean"] == diagnostics["ratio_max"] == 1


def test_k3_estimates_the_kullback_leibler_divergence() -> None:
    old, new = Normal(0.0, 1.0), Normal(0.1, 0.95)
    torch.manual_seed(0)
    x = old.sample((200_000, 1))
    _, diagnostics = clipped_surrogate(new.log_prob(x), old.log_prob(x), torch.ones(len(x)), 0.2)
    assert diagnostics["approx_kl"].item() == pytest.approx(kl_divergence(old, new).item(), rel=0.03)
    # far below float32's resolution of the ratio itself
    tiny = column(1e-4, -1e-4)
    assert clipped_surrogate(tiny, torch.zeros(2, 1), torch.ones(2), 0.2)[1]["approx_kl"].item() >= 0


def test_runaway_ratios_stay_finite() -> None:
    log_prob = column(500.0, -500.0, 500.0).requires_grad_()
    loss, diagnostics = clipped_surrogate(log_prob, torch.zeros(3, 1), tensor(-1.0, 1.0, 1.0), 0.2)
    loss.backward()
    assert loss.isfinite()
    assert log_prob.grad is not None
    assert log_prob.grad.isfinite().all()
    assert all(value.isfinite() for value in diagnostics.values())
    broken, _ = clipped_surrogate(column(math.nan), torch.zeros(1, 1), torch.ones(1), 0.2)
    assert broken.isnan()


def test_clipped_value_loss_by_hand() -> None:
    values = tensor(1.0, 0.1, 2.0, -1.0).requires_grad_()
    old, returns = tensor(0.0, 0.0, 0.0, 0.0), tensor(1.0, 1.0, 0.0, -3.0)
    loss, diagnostics = clipped_value_loss(values, old, returns, clip_range=0.2, huber_delta=1.0)
    # errors 0, -.9, 2, 2; clipped values .2, .1, .2, -.2 with errors -.8, -.9, .2, 2.8
    # huber(delta 1): max(0, .32), max(.405, .405), max(1.5, .02), max(1.5, 2.3)
    assert loss.item() == pytest.approx((0.32 + 0.405 + 1.5 + 2.3) / 4, rel=1e-5)
    assert diagnostics["value_clip_fraction"].item() == pytest.approx(0.75)
    assert not diagnostics["value_clip_fraction"].requires_grad
    loss.backward()
    # the first and last values are held by the clip, the others learn
    assert values.grad is not None
    torch.testing.assert_close(values.grad[[0, 2, 3]], tensor(0.0, 1 / 4, 0.0))
    assert values.grad[1].item() == pytest.approx(-0.9 / 4, rel=1e-5)


def test_value_loss_without_clip_or_huber_is_half_the_squared_error() -> None:
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 64, generator=generator)
    loss, diagnostics = clipped_value_loss(values, old, returns, clip_range=None, huber_delta=None)
    assert loss.item() == pytest.approx(0.5 * (values - returns).square().mean().item(), rel=1e-6)
    assert diagnostics["value_clip_fraction"] == 0
    wide, _ = clipped_value_loss(values, old, returns, clip_range=100.0, huber_delta=100.0)
    torch.testing.assert_close(wide, loss)


def test_explained_variance() -> None:
    returns = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns + 5, returns) == pytest.approx(1, abs=1e-5)
    assert explained_variance(torch.zeros(100), returns) == pytest.approx(0, abs=1e-6)
    assert explained_variance(-returns, returns) == pytest.approx(-3, rel=1e-5)
    assert explained_variance(0.5 * returns, returns) == pytest.approx(0.75, rel=1e-5)
    assert explained_variance(returns, torch.ones(100)) == 0


def test_explained_variance_of_two_processes_is_that_of_all_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    returns = torch.cat([torch.randn(30, generator=generator), 3 + torch.randn(70, generator=generator)])
    values = returns + torch.randn(100, generator=generator)
    parts = [explained_variance_moments(values[rows], returns[rows]) for rows in (slice(0, 30), slice(30, 100))]
    expected = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert explained_variance_from_moments(parts[0] + parts[1]) == pytest.approx(expected.item(), abs=1e-5)


def test_losses_reject() -> None:
    x = torch.zeros(3)
    units = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="clip_range=0.0"):
        clipped_surrogate(units, units, x, 0.0)
    with pytest.raises(ValueError, match="clip_range_high=-0.1"):
        clipped_surrogate(units, units, x, 0.2, -0.1)
    with pytest.raises(ValueError, match=r"must be \(N, U\), \(N, U\) and \(N,\)"):
        clipped_surrogate(units, units, x[:, None], 0.2)
    with pytest.raises(ValueError, match=r"`log_prob` has shape \(3,\)"):
        clipped_surrogate(x, x, x, 0.2)
    with pytest.raises(ValueError, match=r"`old_log_prob` \(3, 1\)"):
        clipped_surrogate(units, units[:, :1], x, 0.2)
    with pytest.raises(ValueError, match="at least 1"):
        clipped_surrogate(units[:0], units[:0], x[:0], 0.2)
    with pytest.raises(ValueError, match="huber_delta=-1.0"):
        clipped_value_loss(x, x, x, clip_range=0.2, huber_delta=-1.0)
    with pytest.raises(ValueError, match="same"):
        explained_variance(x, x[:2])
