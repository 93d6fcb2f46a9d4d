"""A training run: trainer, resuming, processes, LoRA, dry run."""
