"""Compiles the layers of a served model while it serves.

A child process of low priority compiles them into a cache on disk. Then the worker loads them from there between two
steps, compares and times them piece by piece, and keeps them if they are faster.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from marginrm_service.engine.engine import ScoringEngine

if TYPE_CHECKING:
    from marginrm.forward.execution import Choice
    from marginrm.reward_model import RewardModel
    from marginrm.tuning.compile_ahead import Skeleton

_COMMAND = (sys.executable, "-m", "marginrm.tuning.compile_ahead")
_TRIAL_TOKENS = 1_024
# The child works on one core: no pool of compilers, and no library's threads beside torch's own.
_ONE_CORE = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

_log = logging.getLogger(__name__)


async def compile_layers(model: RewardModel, engine: ScoringEngine) -> Choice:
    """Compiles a model's layers, and keeps them if they are faster.

    Args:
        model: The model that the engine runs.
        engine: Its worker carries out the trial, between steps.

    Returns:
        What became of it.

    Raises:
        EngineStoppedError: The engine was closed.
    """
    from marginrm.compiler import use_cache_folder
    from marginrm.forward.execution import Choice
    from marginrm.tuning import compiled
    from marginrm.tuning.compile_ahead import Skeleton
    from marginrm.tuning.timing import trial_groups

    use_cache_folder()
    skeleton = Skeleton.of(model.module)
    if skeleton is None:
        return Choice(False, "layers not compiled, since their code came with the checkpoint")
    failure = await _fill_cache(skeleton)
    if failure:
        return Choice(False, f"layers not compiled, since the compiler failed ({failure})")
    return await engine.interleave(compiled.trial(model.module, trial_groups(model.encoder, _TRIAL_TOKENS)))


async def _fill_cache(skeleton: Skeleton) -> str | None:
    """Runs the child process; returns the last line of its errors if it fails.

    It ends when its standard input is closed, so it does not outlive this process, and is killed if the task is cancelled.
    """
    process = await asyncio.create_subprocess_exec(
        *_COMMAND,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | _ONE_CORE,
        start_new_session=True,  # so that it can be killed with the compilers that it runs
    )
    assert process.stdin
    assert process.stderr
    try:
        process.stdin.write(skeleton.to_json() + b"\n")
        errors = await process.stderr.read()
        await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        process.stdin.close()
    _log.debug("Compiling ahead ended with %s: %s", process.returncode, errors.decode(errors="replace"))
    lines = errors.decode(errors="replace").strip().splitlines()
    return None if process.returncode == 0 else (lines[-1][:200] if lines else f"exit code {process.returncode}")
