"""A checkpoint's configuration, as transformers reads it."""

from __future__ import annotations

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from marginrm.loading.files import CheckpointFiles
from marginrm.loading.foreign import translated
from marginrm.loading.own_code import unknown_type


def load_config(files: CheckpointFiles, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Reads a checkpoint's configuration.

    Raises:
        ModelError: It cannot be read, or transformers does not know the model's type.
    """
    kind = files.config.get("model_type")
    if kind not in CONFIG_MAPPING and not (trust_remote_code and files.config.get("auto_map")):
        raise unknown_type(files)
    with translated(files.name, "configuration"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            files.folder, trust_remote_code=trust_remote_code and kind not in CONFIG_MAPPING
        )
    return config
