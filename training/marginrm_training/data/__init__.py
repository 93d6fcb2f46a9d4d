"""Files -> encoded pairs -> batches."""
