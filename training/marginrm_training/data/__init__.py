"""Files -> encoded pairs -> batches. `read` and `encode_pairs` are the names for code of other projects."""

from marginrm_training.data.splits import encode_pairs, read

__all__ = ["encode_pairs", "read"]
