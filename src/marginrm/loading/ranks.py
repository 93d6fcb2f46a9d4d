"""Tensor parallelism on one machine: each process holds a share of every layer, and all run the same forward pass.

This process is rank 0. It starts the others, which load the checkpoint as it does, and sends them the token ids of each
step; then all of them compute, and the rewards of rank 0 are used.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers.utils.logging import disable_progress_bar

from marginrm.encoding import EncodedGroup
from marginrm.errors import ConfigError, ModelError
from marginrm.forward.module import RewardModule
from marginrm.loading.adapters import base_of
from marginrm.loading.config import load_config
from marginrm.loading.device import resolve_device, resolve_dtype
from marginrm.loading.files import CheckpointFiles
from marginrm.loading.scoring import Loaded, load_for_scoring
from marginrm.loading.weights import quantisation_of

_END_SECONDS = 10.0  # for a process to end by itself
_STEP_LIMIT = timedelta(hours=1)  # the longest that one process waits for another, loading included
_READY = "ready"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _World:
    """What the processes must agree on.

    Attributes:
        size: Number of processes.
        device: `cpu` or `cuda`; a process takes the GPU of its number.
        store: File by which they find each other.
        threads: Threads of each on CPUs.
    """

    size: int
    device: str
    store: Path
    threads: int

    def join(self, rank: int) -> None:
        """Joins the process group; returns when all have."""
        if self.device == "cuda":
            torch.cuda.set_device(rank)
        else:
            torch.set_num_threads(self.threads)
        distributed.init_process_group(
            "nccl" if self.device == "cuda" else "gloo",
            init_method=self.store.as_uri(),
            rank=rank,
            world_size=self.size,
            timeout=_STEP_LIMIT,
            device_id=torch.device("cuda", rank) if self.device == "cuda" else None,
        )


class Ranks:
    """The other processes, as rank 0 sees them. They end with this object, and with this process.

    Args:
        size: Number of processes, this one included.
        device: Type of device: `cpu` or `cuda`.
        load: Called in each other process; returns the module that it computes with. It must be possible to pickle it.

    Raises:
        ConfigError: There are too few GPUs, or this process is part of a process group already.
        ModelError: A process ended before it could begin.
    """

    def __init__(self, size: int, device: str, load: Callable[[], RewardModule]) -> None:
        _check(size, device)
        self.size = size
        folder = Path(tempfile.mkdtemp(prefix="marginrm-ranks-"))
        world = _World(size, device, folder / "store", max(torch.get_num_threads() // size, 1))
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._end = weakref.finalize(self, _end, self._connections, self._processes, folder)
        for rank in range(1, size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_follow, args=(theirs, world, rank, load), name=f"rank-{rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self._await_all()
        world.join(0)

    def await_loaded(self) -> None:
        """Returns once all processes have loaded.

        Raises:
            ModelError: One has ended.
        """
        self._await_all()

    @contextlib.contextmanager
    def step(self, groups: Sequence[EncodedGroup], multiple: int) -> Iterator[None]:
        """Has the other processes compute a step, while the caller computes it in this one.

        Args:
            groups: Encoded responses.
            multiple: As for `RewardModule.collate`.

        Raises:
            SystemExit: The step failed. The processes may be at different places, so none of them can go on.
        """
        try:
            for connection in self._connections:
                connection.send((groups, multiple))
            yield
        except Exception as error:
            _log.exception("A step of %d processes failed", self.size)
            self.close()
            raise SystemExit("A process of the tensor-parallel model has failed. Start the program again.") from error

    def close(self) -> None:
        """Ends the other processes."""
        self._end()

    def _await_all(self) -> None:
        for rank, (connection, process) in enumerate(zip(self._connections, self._processes, strict=True), start=1):
            wait([connection, process.sentinel])
            try:
                connection.recv()
            except (EOFError, OSError):
                self.close()
                raise ModelError(f"The process of rank {rank} ended while loading; its error is above.") from None


def _check(size: int, device: str) -> None:
    if distributed.is_initialized():
        raise ConfigError(
            f"tensor_parallel = {size}: this process has a tensor-parallel model, or runs under torchrun. Load one such "
            "model in a process; serve a second one by another server."
        )
    if device == "cuda" and torch.cuda.device_count() < size:
        raise ConfigError(f"tensor_parallel = {size}: this machine has {torch.cuda.device_count()} GPUs.")


def _follow(connection: Connection, world: _World, rank: int, load: Callable[[], RewardModule]) -> None:
    """Loads, and computes what rank 0 computes until it closes the connection."""
    # A terminal and systemd send these to all processes, and rank 0 decides when there is no more to compute.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    disable_progress_bar()  # rank 0 shows its own
    os.environ["LOCAL_RANK"] = str(rank)  # transformers binds the GPU of that number
    connection.send(_READY)
    world.join(rank)
    module = load()
    connection.send(_READY)
    while True:
        try:
            groups, multiple = connection.recv()
        except EOFError:
            os._exit(0)  # a process group has nothing to clean up, and waits for the others if it is asked to
        batch = module.collate(groups, multiple=multiple).to(module.device)
        with torch.inference_mode():
            module(batch)


def _end_with_rank_0() -> None:
    """Ends this process when rank 0 is gone, whatever it is computing."""
    rank_0 = multiprocessing.parent_process()
    assert rank_0 is not None  # this is a child
    rank_0.join()
    os._exit(1)


def _end(connections: Sequence[Connection], processes: Sequence[BaseProcess], folder: Path) -> None:
    """Ends the processes; those inside of a step are ended by force."""
    for connection in connections:
        connection.close()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    for process in processes:
        process.join(_END_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
    shutil.rmtree(folder, ignore_errors=True)


def load_in_processes(size: int, options: dict[str, Any]) -> tuple[Loaded, Ranks | None]:
    """Loads a checkpoint in one process or in several.

    Args:
        size: Number of processes, this one included.
        options: Arguments of `load_for_scoring`.

    Returns:
        What this process has loaded, and the others; None without others.

    Raises:
        ModelError, ConfigError: As for `load_for_scoring` and `Ranks`.
    """
    if size == 1:
        return load_for_scoring(**options), None
    _check_shareable(size, options["path"])
    device = resolve_device(options["device"])
    # Decided here, since a measurement may come out differently in each process.
    agreed = options | {"dtype": resolve_dtype(options["dtype"], device), "purpose": None, "processes": size}
    ranks = Ranks(size, device.type, partial(_load_module, agreed))
    try:
        loaded = load_for_scoring(**agreed)
        ranks.await_loaded()
    except BaseException:
        ranks.close()
        raise
    return loaded, ranks


def _check_shareable(size: int, files: CheckpointFiles) -> None:
    """Checks that transformers can share a model among so many processes, by its family's own plan.

    Raises:
        ModelError: It cannot.
    """
    config = load_config(base_of(files) if files.is_adapter else files, trust_remote_code=False)
    text = config.get_text_config()
    heads = [getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    uneven = [count for count in heads if count and count % size]
    if quantisation_of(config):
        reason = "its weights are quantised"
    elif not getattr(text, "base_model_tp_plan", None):
        reason = f"transformers has no plan for {config.model_type}"
    elif uneven:
        reason = f"its {uneven[0]} attention heads cannot be shared evenly"
    else:
        return
    raise ModelError(f"{files.name} cannot be shared among {size} processes (tensor_parallel): {reason}.")


def _load_module(options: dict[str, Any]) -> RewardModule:
    return load_for_scoring(**options).module
