"""A run's settings as transformers' arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from marginrm.errors import ConfigError
from marginrm_training.config import TrainConfig
from marginrm_training.run.distributed import ranks


def check_loggers(names: Sequence[str]) -> None:
    """Makes each of transformers' loggers once, so that a missing package shows before the data are read.

    Raises:
        ConfigError: There is no such logger, or its package is not installed.
    """
    for name in names:
        try:
            for logger in get_reporting_integration_callbacks([name]):
                logger()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(f"loggers: {name!r} cannot be used: {error}") from error


def training_arguments(config: TrainConfig, pairs: int, run_dir: Path) -> TrainingArguments:
    """Translates a run into transformers' arguments.

    Args:
        config: The run.
        pairs: Number of training pairs.
        run_dir: Folder of the steps to resume from.

    Raises:
        ConfigError: A step does not consist of whole forward passes on every rank, or the pairs do not fill one.
    """
    optim = config.optim
    reference = optim.train_batch * ranks()
    if optim.pairs_per_step % reference:
        raise ConfigError(
            f"optim.pairs_per_step = {optim.pairs_per_step} is not a multiple of train_batch x ranks = {reference}. "
            "Change one of them: a step consists of whole forward passes."
        )
    if pairs < reference:
        raise ConfigError(
            f"There are {pairs} training pairs, and one forward pass takes train_batch x ranks = {reference}. Lower "
            "optim.train_batch, or add pairs."
        )
    return TrainingArguments(
        output_dir=str(run_dir),
        seed=config.seed,
        data_seed=config.seed,
        num_train_epochs=optim.epochs,
        learning_rate=optim.learning_rate,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.clip,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": optim.min_lr_ratio},
        warmup_steps=optim.warmup_ratio if optim.warmup_ratio < 1 else 0,
        per_device_train_batch_size=optim.train_batch,
        gradient_accumulation_steps=optim.pairs_per_step // reference,
        # Otherwise ranks fill their last batches with pairs of this epoch again, which mu_B and loss would count twice.
        dataloader_drop_last=True,
        bf16=config.model.dtype == "bfloat16",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        save_total_limit=2,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        report_to=list(config.loggers) or "none",
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # every weight takes part in every step
    )
