"""Shards scored by a pool of Ray actors, each with the model. The driver reads, hands out and writes whole shards.

Plain actors are used in place of `ray.data.map_batches`, for three reasons. A shard stays one unit of work, where Ray Data
splits and merges blocks of rows. A shard that kills its actors ends the run, where Ray Data (2.60) restarts and retries
without a limit. And only the driver touches the files, where Ray Data reads them in tasks on any node.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from marginrm.bulk.plan import Shard
from marginrm.bulk.scoring import ModelOptions
from marginrm.bulk.workers import ScoredShard, ShardScorer, model_facts
from marginrm.errors import ConfigError, MarginRMError, ModelError

_AHEAD = 2  # shards that an actor holds: one that it scores, and the next
_MOST_DEATHS = 3  # of actors that held one shard, or of actors in a row that did not load the model
_STARTS = 3  # of a cluster on this machine


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """The pool.

    Attributes:
        address: `local` starts a cluster on this machine, `auto` joins the running one, anything else is an address.
        low: Actors at the start.
        high: Most actors; more than `low` are started while there is work for them.
        gpus: GPUs of an actor; 0.5 lets two share one.
        cpus: CPUs of an actor, and its compute threads.
    """

    address: str = "local"
    low: int = 1
    high: int = 1
    gpus: float = 0.0
    cpus: int = 1

    @staticmethod
    def bounds(text: str) -> tuple[int, int]:
        """Reads `MIN:MAX`, or one number for both.

        Raises:
            ConfigError: The text has another form.
        """
        low, colon, high = text.partition(":")
        high = high if colon else low
        if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
            raise ConfigError(f"--ray-actors {text}: give MIN:MAX, such as 1:8, or one number, from 1.")
        return int(low), int(high)


class _Scorer:
    """The actor: a model, loaded once."""

    def __init__(self) -> None:
        self._model: Any = None

    def load(self, options: ModelOptions) -> dict[str, Any]:
        self._model = options.load()
        return model_facts(self._model)

    def score(self, shard: Shard, scorer: ShardScorer) -> ScoredShard:
        return scorer.score(self._model, shard)


@dataclass(eq=False, slots=True)
class _Actor:
    handle: Any
    ready: bool = False
    dead: bool = False
    shards: list[int] = field(default_factory=list)


class RayPool:
    """A pool of actors between two bounds.

    Args:
        options: The pool.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, options: RayOptions) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a scoring run sends no reports
        try:
            import ray
        except ImportError as error:
            raise ConfigError(f'--ray needs ray ({error}). Run: pip install "marginrm[service,ray]"') from error
        self._ray: Any = ray
        self._options = options
        self._remote = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_restarts=0)(_Scorer)
        self._actors: list[_Actor] = []
        self._running: dict[Any, tuple[_Actor, Shard | None]] = {}  # a task without a shard loads the model
        self._again: deque[Shard] = deque()
        self._deaths: Counter[int] = Counter()
        self._failed_loads = 0
        self._facts: dict[str, Any] = {}
        self._connect()

    def _connect(self) -> None:
        """Joins or starts the cluster. Ray gives a new one 30 s, which a busy machine may exceed: it is tried again.

        Raises:
            ConfigError: There is no such cluster, or it does not start.
        """
        local = self._options.address == "local"
        for attempt in range(1, _STARTS + 1):
            try:
                self._ray.init(
                    address=self._options.address, log_to_driver=False, include_dashboard=False if local else None
                )
                return
            except Exception as error:  # Ray raises plain exceptions here
                self._ray.shutdown()
                if not local or attempt == _STARTS:
                    raise ConfigError(
                        f"--ray {self._options.address}: {' '.join(str(error).split())[:300]} Give local, auto, or the "
                        "address of a running cluster."
                    ) from error

    def start(self, options: ModelOptions) -> dict[str, Any]:
        """Starts the first actors and waits until one has loaded the model.

        With the dtype `auto`, the first actor measures which one is faster, and the others take the same.

        Raises:
            ConfigError: The cluster cannot place an actor.
            ModelError: The model cannot be loaded.
        """
        self._model = options
        self._check_room()
        self._add()
        if options.dtype != "auto":
            self._fill()
        while not self._facts:
            self._collect()
        self._model = replace(options, dtype=self._facts["dtype"])
        self._fill()
        return self._facts

    def run(self, shards: Iterable[Shard], scorer: ShardScorer) -> Iterator[ScoredShard]:
        """Yields each shard scored, as they are done.

        The input is read no faster than actors take it. Each actor that dies is replaced, and its shards are scored
        again by others.

        Raises:
            ModelError: Several actors died with one shard, or while they loaded the model.
        """
        self._scorer = self._ray.put(scorer)
        self._shards = iter(shards)
        self._more = True
        while True:
            self._hand_out()
            if not self._more and not self._again and not any(shard for _, shard in self._running.values()):
                return
            yield from self._collect()

    def stop(self) -> None:
        """Ends the actors, and the cluster if it was started here."""
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._ray.shutdown()

    def _check_room(self) -> None:
        """Checks that the cluster has the GPUs of one actor: it would otherwise wait for ever, without a word."""
        found = self._ray.cluster_resources()
        if self._options.address == "local" and self._options.gpus > found.get("GPU", 0):
            raise ConfigError(
                f"--ray-gpus {self._options.gpus}: Ray finds {found.get('GPU', 0):g} GPUs on this machine."
            )
        if self._options.address == "local" and self._options.cpus > found.get("CPU", 0):
            raise ConfigError(
                f"--ray-cpus {self._options.cpus}: Ray finds {found.get('CPU', 0):g} CPUs on this machine."
            )

    def _fill(self) -> None:
        while len(self._actors) < self._options.low:
            self._add()

    def _add(self) -> None:
        actor = _Actor(self._remote.remote())
        self._actors.append(actor)
        self._running[actor.handle.load.remote(self._model)] = (actor, None)

    def _hand_out(self) -> None:
        """Gives shards to actors that have room, and starts or ends actors."""
        for depth in range(1, _AHEAD + 1):
            for actor in [one for one in self._actors if one.ready and len(one.shards) < depth]:
                shard = self._next()
                if shard is not None:
                    actor.shards.append(shard.number)
                    self._running[actor.handle.score.remote(shard, self._scorer)] = (actor, shard)
                elif not actor.shards:
                    self._end(actor)
        busy = all(actor.ready and len(actor.shards) == _AHEAD for actor in self._actors)
        if self._more and busy and len(self._actors) < self._options.high:
            self._add()

    def _next(self) -> Shard | None:
        if self._again:
            return self._again.popleft()
        shard = next(self._shards, None) if self._more else None
        self._more = shard is not None
        return shard

    def _collect(self) -> Iterator[ScoredShard]:
        """Waits for a task and returns its shard, if it scored one."""
        done, _ = self._ray.wait(list(self._running), num_returns=1)
        return iter([scored for scored in map(self._taken, done) if scored is not None])

    def _taken(self, task: Any) -> ScoredShard | None:
        from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

        actor, shard = self._running.pop(task)
        try:
            result = self._ray.get(task)
        except (RayActorError, ObjectLostError) as error:
            self._lost(actor, shard, error)
            return None
        except RayTaskError as error:
            if isinstance(error.cause, MarginRMError):
                raise error.cause from None
            raise
        if shard is None:
            self._check_facts(result)
            actor.ready = True
            self._failed_loads = 0
            return None
        actor.shards.remove(shard.number)
        scored: ScoredShard = result
        return scored

    def _check_facts(self, facts: dict[str, Any]) -> None:
        if not self._facts:
            self._facts = facts
        if facts != self._facts:
            raise ModelError(f"Two actors have loaded different models: {self._facts} and {facts}. Give --dtype.")

    def _lost(self, actor: _Actor, shard: Shard | None, error: Exception) -> None:
        """Replaces an actor that died, and notes its shard to be scored again."""
        if not actor.dead:
            actor.dead = True
            self._end(actor)
            self._add()
        if shard is None:
            self._failed_loads += 1
        else:
            self._deaths[shard.number] += 1
            self._again.append(shard)
        if self._failed_loads >= _MOST_DEATHS or (shard and self._deaths[shard.number] >= _MOST_DEATHS):
            place = f"shard {shard.number} ({shard.rows[0].source} and after)" if shard else "the load of the model"
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{_MOST_DEATHS} actors have died in {place}. Is there too little memory? Ray says: {reason}"
            )

    def _end(self, actor: _Actor) -> None:
        self._actors.remove(actor)
        self._ray.kill(actor.handle)
