"""Process reward models: found by a checkpoint's class and head, or as the user says."""

from __future__ import annotations

from dataclasses import replace

from marginrm.errors import ConfigError, HeadError
from marginrm.loading.files import CheckpointFiles
from marginrm.process_rewards import FORMS, StepReading
from marginrm.reading import ReadingOptions

# Classes by the code that their authors published.
_FORM_OF_CLASS = {
    "Qwen2ForProcessRewardModel": "qwen2.5-math-prm",  # Qwen/Qwen2.5-Math-PRM-7B: modeling_qwen2_rm.py
    "Qwen2ForPrmModel": "skywork-o1-prm",  # SkyworkAI/skywork-o1-prm-inference: vllm_add_dummy_model
}


def with_steps(
    files: CheckpointFiles, options: ReadingOptions, adapter: CheckpointFiles | None = None
) -> tuple[StepReading | None, ReadingOptions]:
    """Returns how a process reward model's steps are read, and the options with what its form says of head and text.

    Args:
        files: The checkpoint; an adapter's base with the adapter's weights.
        options: What the user says. Anything said there takes precedence over the form.
        adapter: The adapter's own files, or None.

    Returns:
        The reading, or None for a model that gives one reward per response, and the options.

    Raises:
        ConfigError: Options about steps for another kind of model, or that exclude each other.
        HeadError: It has several classes per token and nothing says which of them is the reward.
    """
    form = _form(files, options, adapter)
    if form is None:
        idle = [name for name in ("step_value", "aggregate") if getattr(options, name) is not None]
        if idle:
            raise ConfigError(
                f"{', '.join(idle)}: {files.name} is not known to be a process reward model. Say what ends its steps: "
                "--steps SEPARATOR (Python: ReadingOptions(steps=...)), or leave the option out."
            )
        return None, options
    rows = head_rows(files)
    tokens = options.reward_tokens or (None if rows else form.reward_tokens)
    two = rows == 2 or bool(tokens and len(tokens) == 2)
    value = options.step_value or ("raw" if form.form == "custom" and not two else form.value)
    reading = replace(
        form,
        value=value,
        aggregate=options.aggregate or form.aggregate,
        frame=options.frame or form.frame,
        reward_tokens=tokens,
    )
    if reading.value == "raw" and reading.aggregate == "product":
        raise ConfigError(
            "aggregate = product: raw values may be negative, so their product says nothing. Use another."
        )
    weights = options.label_weights or ((-1.0, 1.0) if rows == 2 and not tokens else None)
    return reading, replace(options, reward_tokens=tokens, label_weights=weights, frame=reading.frame)


def head_rows(files: CheckpointFiles) -> int | None:
    """Returns how many values a checkpoint's head gives; None if it has no head that is called as heads of PRMs are."""
    layers = {
        name: stored.shape[0]
        for name, stored in files.tensors.items()
        if stored.shape and name.endswith(".weight") and name.partition(".")[0] in ("score", "classifier", "v_head")
    }
    return layers[max(layers)] if layers else None


def _form(files: CheckpointFiles, options: ReadingOptions, adapter: CheckpointFiles | None) -> StepReading | None:
    if options.steps is not None:
        separator = options.steps.replace("\\n", "\n")
        custom = StepReading(form="custom", separator=separator, value="probability", aggregate="min")
        return FORMS.get(options.steps, custom)
    known = _FORM_OF_CLASS.get(files.class_name)
    if known is not None:
        return FORMS[known]
    task = adapter.adapter.get("task_type") if adapter is not None else None
    if (files.class_name.endswith("ForTokenClassification") or task == "TOKEN_CLS") and head_rows(files) == 2:
        return FORMS["trl-prm"]
    return None


def check_steps(files: CheckpointFiles, steps: StepReading | None, *, causal: bool, has_template: bool) -> None:
    """Checks that steps can be read.

    Raises:
        HeadError: The model is an encoder, in which the reward of a step would depend on the steps after it.
        ConfigError: Steps are turns of a conversation, and there is no chat template.
    """
    if steps is None:
        return
    if not causal:
        raise HeadError(
            f"{files.name} is an encoder, and steps are read in decoders only: in an encoder the reward of a step would "
            "depend on the steps after it."
        )
    if steps.layout == "turns" and not has_template:
        raise ConfigError(
            f"steps = {steps.form}: its steps are turns of a conversation, and the tokenizer of {files.name} has no chat "
            "template. Save it with one, or give the separator of its steps."
        )
