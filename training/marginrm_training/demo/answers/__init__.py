"""Prompts with good answers, by subject, in plain text: see `marginrm_training.demo.texts`."""
