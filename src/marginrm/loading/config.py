"""A checkpoint's configuration, as transformers reads it."""

from __future__ import annotations

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from marginrm.errors import ModelError
from marginrm.loading.files import CheckpointFiles
from marginrm.loading.foreign import translated
from marginrm.loading.own_code import unknown_type

_REWARD_MODEL = "_reward_model"  # OpenAssistant's types: gpt_neox_reward_model is GPT-NeoX with a head


def load_config(files: CheckpointFiles, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Reads a checkpoint's configuration.

    Raises:
        ModelError: It cannot be read, or transformers does not know the model's type.
    """
    kind = files.config.get("model_type")
    if not kind and not files.config.get("auto_map"):
        raise ModelError(f"{files.name}/config.json has no model_type, such as llama or bert. Add it.")
    known = str(kind).removesuffix(_REWARD_MODEL)
    if known != kind and known in CONFIG_MAPPING:
        with translated(files.name, "configuration"):
            return CONFIG_MAPPING[known].from_pretrained(files.folder)
    if kind not in CONFIG_MAPPING and not (trust_remote_code and files.config.get("auto_map")):
        raise unknown_type(files)
    with translated(files.name, "configuration"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            files.folder, trust_remote_code=trust_remote_code and kind not in CONFIG_MAPPING
        )
    return config
