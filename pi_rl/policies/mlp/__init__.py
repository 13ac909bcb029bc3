"""A small flow-matching policy without a VLM, as LeRobot policy type `flow_mlp`: state in, action chunk out.

For tests and Gymnasium benchmarks, where rendering would only cost time. Importing this package registers the type;
LeRobot's commands do it with `--policy.discover_packages_path=pi_rl.policies.mlp`.
"""

from pi_rl.policies.mlp.configuration_flow_mlp import FlowMLPConfig

__all__ = ["FlowMLPConfig"]
