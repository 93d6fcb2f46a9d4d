"""Files to encoded pairs to batches."""
