"""From rewards to probabilities: temperatures, groups, and rewards that carry their uncertainty. Pure Python."""
