"""Checkpoints from a folder or the Hub: found, read as their authors meant, and made ready to score or to train."""

from marginrm.loading.device import resolve_device, resolve_dtype
from marginrm.loading.encoder import load_encoder
from marginrm.loading.files import CheckpointFiles, find_checkpoint
from marginrm.loading.scoring import Loaded, load_for_scoring
from marginrm.loading.tokenizer import length_limit
from marginrm.loading.training import draw_head, load_for_training, repeat_positions

__all__ = [
    "CheckpointFiles",
    "Loaded",
    "draw_head",
    "find_checkpoint",
    "length_limit",
    "load_encoder",
    "load_for_scoring",
    "load_for_training",
    "repeat_positions",
    "resolve_device",
    "resolve_dtype",
]
