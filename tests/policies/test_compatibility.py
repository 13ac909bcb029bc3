"""Policy and environment must speak of the same things."""

from types import SimpleNamespace

import pytest

from pi_rl.policies.flow_policy import check_compatibility


@pytest.fixture
def spec(toolbox):
    return SimpleNamespace(
        name="toy",
        cameras=dict.fromkeys([*toolbox.cameras, "observation.images.extra"], (32, 32)),
        state_dim=toolbox.state_dim,
        action_dim=toolbox.action_dim,
    )


def test_a_fitting_pair_passes(policy, spec):
    check_compatibility(policy, spec)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cameras", {"observation.image": (32, 32)}, "wrist.*'toy' renders.*observation.image"),
        ("state_dim", 9, "size 4.*'toy' gives 9"),
        ("action_dim", 7, "size 3.*'toy' takes 7"),
    ],
)
def test_differences_name_both_sides(policy, spec, field, value, message):
    setattr(spec, field, value)
    with pytest.raises(ValueError, match=message):
        check_compatibility(policy, spec)


@pytest.mark.parametrize("steps", [0, 7])
def test_executed_steps_must_be_predicted(policy, spec, steps):
    policy.n_action_steps = steps
    with pytest.raises(ValueError, match=f"n_action_steps={steps}.*chunk_size=6"):
        check_compatibility(policy, spec)
