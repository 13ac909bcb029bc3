"""Small π0 and π0.5 for tests and the quick start, as LeRobot policy types `pi0_small` and `pi05_small`.

Importing this package registers both types; LeRobot's commands do it with
`--policy.discover_packages_path=pi_rl.policies.small` (or `--env.discover_packages_path` beside `--policy.path`).
"""

from pi_rl.policies.small.configuration_pi0_small import PI0SmallConfig
from pi_rl.policies.small.configuration_pi05_small import PI05SmallConfig

__all__ = ["PI05SmallConfig", "PI0SmallConfig"]
