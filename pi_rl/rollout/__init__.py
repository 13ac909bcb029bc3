"""Where policy and environments meet: collecting rollouts for training and evaluating policies."""
