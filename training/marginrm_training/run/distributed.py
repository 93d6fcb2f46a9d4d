"""The processes that train together: their number, what the first of them prints, sharded weights, and their end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils.environment import parse_flag_from_env
from transformers import Trainer

from marginrm.errors import ConfigError
from marginrm.forward.module import RewardModule


def ranks() -> int:
    """Returns the number of processes that train together; `accelerate launch` starts more than one.

    The first call joins this process to the others.
    """
    state: Any = PartialState(cpu=not torch.cuda.is_available())
    return int(state.num_processes)


def print_once(line: str) -> None:
    """Prints a line for people, once for all processes."""
    if PartialState().is_main_process:
        print(line)  # noqa: T201 - the command's output


def leftover_pairs(pairs: int, train_batch: int) -> int:
    """Returns the number of pairs that an epoch leaves out: they do not fill the last batch of every rank.

    Args:
        pairs: Number of training pairs.
        train_batch: Pairs per forward pass and rank.
    """
    return pairs % (train_batch * ranks())


def check_sharding(*, sharded: bool) -> None:
    """Refuses to train without shards where accelerate was started for FSDP.

    Raises:
        ConfigError: accelerate was started for FSDP and trains without it, as it does on CPUs without a message.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not sharded:
        raise ConfigError(
            "accelerate was started with an FSDP configuration, and on CPUs it shards nothing. Start it on GPUs, or "
            "with examples/accelerate/ddp_cpu.yaml."
        )


def gather_trained_module(
    trainer: Trainer, module: RewardModule, load_again: Callable[[], RewardModule]
) -> RewardModule:
    """Returns the trained module with all its weights, gathered on the first rank where FSDP or DeepSpeed shards them.

    Every rank must call this. On the other ranks of a sharded run the returned module is not the trained one.

    Args:
        trainer: The trainer after training.
        module: The module that it trains.
        load_again: Loads the module that the run started from; a gathered state fits no sharded module.
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return module
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return module
    whole = load_again()
    whole.load_state_dict(weights)
    return whole


def shut_down_process_group(trainer: Trainer) -> None:
    """Destroys the process group, after the wrapped model that uses it; every rank must call this.

    If the interpreter's exit is left to do it, the group's threads sometimes abort the process, and a wrapped model
    that outlives its group sometimes waits forever.
    """
    trainer.model_wrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    trainer.accelerator.free_memory()  # collects garbage too
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
