"""Ray Serve's request router for prompts: the same prompt goes to the same replica while that has room.

A replica keeps keys and values of prompts that it computed, and it packs responses to one prompt beside each other. Both
save computation only if the responses to a prompt come to one replica. Ray pickles this module into its proxies.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from marginrm_service.ray_serve import affinity
from marginrm_service.settings import DEFAULT_MODEL


class PromptRouter(RequestRouter):
    """Routes by the key in the session header, which `proxy` sets; requests without a key go to the shorter of two queues.

    Keyword arguments, from `request_router_config.request_router_kwargs`:

    - `load_factor`: the bound on a replica's requests as a multiple of the mean; above 1, by default 1.25.
    - `free_requests`: requests that a replica takes whatever the others have; by default 8.
    - `models`, `models_per_replica`: names of all models, and how many a replica holds. A model's requests then go to its
      own replicas only. The application sets both where `max_loaded_models` is below the number of models.
    """

    def initialize_state(
        self,
        load_factor: float = affinity.DEFAULT_LOAD_FACTOR,
        free_requests: int = affinity.DEFAULT_FREE_REQUESTS,
        models: Sequence[str] = (),
        models_per_replica: int = 0,
        **unknown: Any,
    ) -> None:
        """Takes the keyword arguments of the configuration.

        Raises:
            ValueError: An argument is unknown or out of range.
        """
        if unknown:
            raise ValueError(f"unknown request_router_kwargs: {', '.join(sorted(unknown))}.")
        if load_factor <= 1:
            raise ValueError(f"load_factor is {load_factor}; it must be above 1, or no replica may have room.")
        self._load_factor = load_factor
        self._free_requests = free_requests
        self._models = tuple(models)
        self._models_per_replica = models_per_replica
        self._homes: tuple[frozenset[str], dict[str, list[str]]] = (
            frozenset(),
            {},
        )  # replicas, and the models' among them

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns ranks of replicas, the preferred first. Within a rank, Ray takes the one with the shortest queue."""
        if not candidate_replicas:
            return []
        key = model = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Ray tries again without a pause
            key = pending_request.metadata.session_id
            model = pending_request.metadata.multiplexed_model_id
        replicas = self._of_model(model, {replica.replica_id.unique_id: replica for replica in candidate_replicas})
        if not key:
            return [random.sample(list(replicas.values()), min(2, len(replicas)))]
        loads = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        order = affinity.with_room_first(
            affinity.preference(key, replicas),
            loads,
            load_factor=self._load_factor,
            free_requests=self._free_requests,
        )
        return [[replicas[name]] for name in order]

    def _of_model(self, model: str, replicas: dict[str, RunningReplica]) -> dict[str, RunningReplica]:
        """Returns the replicas that hold a model; all of them if each holds all models, or for an unknown one."""
        if not self._models:
            return replicas
        known, homes = self._homes
        if known != replicas.keys():  # they change seldom, and hashing each model with each replica takes long
            homes = affinity.homes(self._models, replicas, self._models_per_replica)
            self._homes = frozenset(replicas), homes
        first = homes[self._models[0]]  # also answers to requests without a model
        names = homes.get(model, list(replicas) if model not in {"", DEFAULT_MODEL} else first)
        return {name: replicas[name] for name in names}
