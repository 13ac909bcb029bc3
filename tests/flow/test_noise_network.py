import math

import pytest
import torch
from torch import nn

from pi_rl.flow.noise_network import NoiseNetwork

LOW, HIGH = 0.08, 0.16


def network(**options) -> NoiseNetwork:
    torch.manual_seed(0)
    return NoiseNetwork(16, 3, LOW, HIGH, **options)


def head(net: NoiseNetwork) -> nn.Linear:
    layer = net.layers[-1]
    assert isinstance(layer, nn.Linear)
    return layer


def test_starts_at_the_geometric_mean_of_the_bounds() -> None:
    std = network()(torch.randn(4, 5, 16))
    assert std.shape == (4, 5, 3)
    torch.testing.assert_close(std, torch.full_like(std, math.sqrt(LOW * HIGH)))


def test_output_interpolates_in_log_space_and_reaches_the_bounds() -> None:
    net = network()
    for output, expected in ((1e4, HIGH), (-1e4, LOW), (math.atanh(0.5), LOW ** (1 / 4) * HIGH ** (3 / 4))):
        nn.init.constant_(head(net).bias, output)
        std = net(torch.randn(2, 5, 16))
        torch.testing.assert_close(std, torch.full_like(std, expected), rtol=1e-6, atol=0)
        assert std.min() >= torch.tensor(LOW)
        assert std.max() <= torch.tensor(HIGH)


def test_stays_within_the_bounds_for_any_weights() -> None:
    net = network()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=3.0)
    std = net(100 * torch.randn(64, 5, 16))
    assert std.min() >= torch.tensor(LOW)
    assert std.max() <= torch.tensor(HIGH)
    assert std.std() > 0


def test_layers_and_gradients() -> None:
    net = network()
    assert [tuple(p.shape) for p in net.parameters() if p.ndim == 2] == [(128, 16), (64, 128), (32, 64), (3, 32)]
    nn.init.normal_(head(net).weight)
    features = torch.randn(2, 5, 16, requires_grad=True)
    net(features).log().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


def test_float32_under_autocast() -> None:
    net = network()
    nn.init.normal_(head(net).weight)
    features = torch.randn(2, 5, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = net(features)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, net(features))


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.1), (-0.1, 0.1), (0.2, 0.1), (0.1, math.inf)])
def test_bounds_are_checked(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="0 < std_min <= std_max"):
        NoiseNetwork(16, 3, low, high)


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        NoiseNetwork(16, 0, LOW, HIGH)
