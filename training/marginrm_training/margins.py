"""Names of the training method for code of other projects; their home is `marginrm_training.method.margins`."""

from marginrm_training.method.margins import PRESETS, MarginMethod, named

__all__ = ["PRESETS", "MarginMethod", "named"]
