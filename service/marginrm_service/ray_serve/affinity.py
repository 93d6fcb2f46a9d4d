"""Rendezvous hashing with bounded loads: the order in which replicas are tried for a key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

DEFAULT_LOAD_FACTOR = 1.25
DEFAULT_FREE_REQUESTS = 8


def preference(key: str, replicas: Iterable[str]) -> list[str]:
    """Returns the replicas in the order of a key's preference: highest random weight first.

    Every proxy finds the same order, without shared state. A replica that comes or goes moves only the keys that prefer
    it (Thaler and Ravishankar, 1998, "Using name-based mappings to increase hit rates").

    Args:
        key: The key of a prompt.
        replicas: Names of the replicas.
    """
    return sorted(replicas, key=lambda replica: _weight(key, replica), reverse=True)


def with_room_first(order: list[str], loads: Mapping[str, int], *, load_factor: float, free_requests: int) -> list[str]:
    """Returns an order with the replicas that have room before those that have none.

    A replica has room below `free_requests`, and below `load_factor` times the mean load with the new request. So at
    least one replica has room, a prompt that many requests share spreads to the next replicas of its order only, and no
    queue grows far beyond the others (Mirrokni, Thorup and Zadimoghaddam, 2018, "Consistent hashing with bounded
    loads").

    Args:
        order: Replicas by preference.
        loads: Requests of each replica that wait or are computed; 0 for one that is absent.
        load_factor: The bound on a load as a multiple of the mean; above 1.
        free_requests: Requests that a replica takes whatever the others have.
    """
    bound = max(free_requests, load_factor * (sum(loads.get(replica, 0) for replica in order) + 1) / len(order))
    return sorted(order, key=lambda replica: loads.get(replica, 0) >= bound)  # stable


def homes(models: Sequence[str], replicas: Iterable[str], per_replica: int) -> dict[str, list[str]]:
    """Returns the replicas that serve each model, where a replica holds fewer models than there are.

    Models take turns in choosing, each the replica that it prefers among those with a free place, until no place is
    left. So every proxy finds the same homes, no replica has more models than places, and no model is without a home.
    Only with fewer places than models do replicas hold more: the least recently used model then leaves memory.

    Args:
        models: Names of the models, in the order of the settings.
        replicas: Names of the replicas.
        per_replica: Places of a replica.
    """
    held = dict.fromkeys(sorted(replicas), 0)
    found: dict[str, list[str]] = {model: [] for model in models}
    free = True
    while free:
        free = False
        for model in models:
            order = [replica for replica in preference(model, held) if replica not in found[model]]
            choice = next((replica for replica in order if held[replica] < per_replica), None)
            if choice is None and not found[model]:
                choice = min(order, key=held.__getitem__, default=None)  # stable: the preferred of the least used
            if choice is not None:
                found[model].append(choice)
                held[choice] += 1
                free = True
    return found


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{replica}".encode(), digest_size=8).digest()
