"""Reinforcement learning on tensors: advantages, losses and the rollout buffer."""
