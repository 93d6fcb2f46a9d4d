"""Loading a model: weights and self-test in a thread, then warm-up on its own worker."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from marginrm.errors import MarginRMError, ModelError
from marginrm.tuning.timing import trial_groups
from marginrm_service.engine.compute_thread import in_compute_thread
from marginrm_service.engine.job import Job
from marginrm_service.models.served_model import ServedModel
from marginrm_service.settings import ModelSpec, Settings
from marginrm_service.telemetry import logs
from marginrm_service.upstream.model import UpstreamModel, client_of
from marginrm_service.upstream.watch import wait_until_up

if TYPE_CHECKING:
    from marginrm.reward_model import RewardModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: The model.
        golden: Largest difference of a golden reward; None if the checkpoint has no golden samples.
        folder: The checkpoint, if it is a local folder.
    """

    model: RewardModel | UpstreamModel
    golden: float | None
    folder: Path | None


async def load(spec: ModelSpec, settings: Settings) -> LoadedModel:
    """Loads and tests a model in a thread of its own.

    Raises:
        ModelError: It cannot be loaded, or does not reproduce its golden samples.
    """
    started = perf_counter()
    upstream = settings.upstream_of(spec.name)
    _log.info("Loading model %r from %s%s", spec.name, spec.path, f", computed by {upstream.url}" if upstream else "")
    loaded = await in_compute_thread(partial(load_model, spec, settings), "load-model")
    model, golden, info = loaded.model, loaded.golden, loaded.model.info
    _log.info(
        "Model %r is loaded after %.1f s: %s, %s; %s; %s; %s; %s; at most %s tokens",
        *(info.name, perf_counter() - started, info.revision, info.dtype, model.forward_reason),
        model.encoder.token_ids.reason,
        "no golden samples to reproduce" if golden is None else f"golden samples reproduced within {golden:.2g}",
        f"calibrated, T = {info.temperature:.3g}" if info.calibrated else "not calibrated, T = 1",
        f"{model.encoder.max_length:,}",
    )
    return loaded


def load_model(spec: ModelSpec, settings: Settings) -> LoadedModel:
    """Loads a model, reproduces its golden samples, and measures its token budget if the settings name none.

    Raises:
        ModelError: It cannot be loaded, or does not reproduce its golden samples.
        UpstreamUnavailableError: The server that computes it does not answer.
    """
    logs.adopt_transformers()
    folder = Path(spec.path)
    upstream = settings.upstream_of(spec.name)
    if upstream:
        remote = UpstreamModel.load(spec, upstream, settings)
        remote.encoder.token_ids.load()
        return LoadedModel(remote, remote.golden, folder if folder.is_dir() else None)
    from marginrm.reward_model import RewardModel

    model = RewardModel.from_pretrained(
        spec.path,
        name=spec.name,
        dtype=settings.dtype,
        device=settings.device,
        max_length=settings.max_length,
        reading=settings.reading,
        token_budget=settings.token_budget,
        compiled=settings.compile == "on",
        deterministic=settings.deterministic,
        prefix_cache_mib=settings.prefix_cache_mib,
        tensor_parallel=settings.tensor_parallel,
    )
    try:
        golden = model.verify_golden()
        if settings.token_budget is None:
            model.measure_token_budget()
    except BaseException:
        model.close()
        raise
    model.encoder.token_ids.load()
    return LoadedModel(model, golden, folder if folder.is_dir() else None)


async def wait_for_upstream(spec: ModelSpec, settings: Settings, report: Callable[[str], None]) -> None:
    """Returns once the server that computes a model takes requests; at once if there is none.

    Args:
        spec: The model.
        settings: They name its server.
        report: Called with the reason while it does not.

    Raises:
        MarginRMError: A setting is not acceptable, or another kind of server answers.
    """
    upstream = settings.upstream_of(spec.name)
    if upstream:
        with contextlib.closing(client_of(upstream, settings)) as client:
            await wait_until_up(client, spec.name, report)


async def start(served: ServedModel) -> None:
    """Starts the worker of a model and warms it up.

    Raises:
        MarginRMError: The model cannot score. The worker has ended.
    """
    served.engine.start()
    try:
        await warm_up(served)
    except MarginRMError:
        await served.close(0)
        raise


async def warm_up(served: ServedModel) -> None:
    """Scores in the worker thread, so that no client waits for the set-up work of the first forward passes.

    The second step is as large as any. It allocates the memory of such a step, and gives admission the first rate.

    Raises:
        MarginRMError: The model cannot score.
    """
    group = [served.encoder.encode("Are you there?", response, "prompt_left") for response in ("Yes, I am.", "No.")]
    for groups in ([group], trial_groups(served.encoder, served.token_budget)):
        job = Job.of(groups, share_prefix=served.shares_prefixes)
        await served.engine.run(job)
        failures = [outcome for outcomes in job.outcomes for outcome in outcomes if isinstance(outcome, MarginRMError)]
        if failures:
            raise ModelError(f"The first forward pass failed: {failures[0]}") from failures[0]
