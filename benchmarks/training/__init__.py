"""Training beside TRL's `RewardTrainer`: its speed and its quality; see docs/experiments.md."""
