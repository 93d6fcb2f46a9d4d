"""Target margins and losses."""
