"""GRPO for flow-matching policies: no critic, episodes of one initial state are compared with each other."""

import torch

from pi_rl.rl.advantages import group_advantages, informative_groups
from pi_rl.rollout.rollout import Rollout
from pi_rl.trainer.flow_grpo_config import FlowGRPOConfig
from pi_rl.trainer.flow_trainer import Estimates, FlowTrainer


class FlowGRPOTrainer(FlowTrainer):
    """Fine-tunes a flow-matching policy with GRPO in simulators (πRL, appendix A, Eq. 17).

    Every iteration runs one episode in each environment; ``group_size`` neighbouring environments start from the same
    state of the same task. All chunks of an episode share its advantage, the episode's return relative to its group.
    Rollout, prefix cache, update, evaluation and checkpoints are those of
    :class:`~pi_rl.trainer.flow_ppo_trainer.FlowPPOTrainer`, and so are the arguments.
    """

    algorithm = "GRPO"
    config_class = FlowGRPOConfig
    args: FlowGRPOConfig

    @property
    def group_size(self) -> int:
        """Environments that start from the same initial state."""
        return self.args.group_size

    def estimate(self, rollout: Rollout) -> Estimates:
        """Group-relative advantages, the same for all chunks of an episode; uniform groups are left out."""
        returns = torch.where(rollout.valid, rollout.rewards, torch.zeros_like(rollout.rewards)).sum(0)
        advantages = group_advantages(returns, rollout.groups).expand_as(rollout.rewards)
        informative = informative_groups(returns, rollout.groups)
        groups = torch.tensor([float(len(rollout.groups)), float(informative.sum())], dtype=torch.float64)
        total, useful = self.reduce(groups).tolist()
        used = rollout.valid & informative if self.args.filter_groups else None
        metrics = {"groups/informative": useful / total}
        return Estimates(advantages, used=used, normalize=False, metrics=metrics)
