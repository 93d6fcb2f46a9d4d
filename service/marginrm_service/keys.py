"""API keys: a file of names and hashes, the owner of a presented key, and a rate limit for each owner.

A line is `NAME sha256:HEX`; `#` begins a comment. A key is 256 random bits, so a plain SHA-256 cannot be inverted by
search, and a slow password hash is not needed. The file never holds a key itself.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from marginrm.errors import ConfigError
from marginrm.text import NAME_PATTERN

_log = logging.getLogger(__name__)
_LINE = re.compile(rf"(?P<name>{NAME_PATTERN})\s+sha256:(?P<digest>[0-9a-f]{{64}})")
_PREFIX = "mrm_"  # recognised by secret scanners


def new_key() -> str:
    """Returns a new random key."""
    return _PREFIX + secrets.token_urlsafe(32)


def key_line(name: str, key: str) -> str:
    """Returns the line of a key file that admits a key.

    Raises:
        ConfigError: The name is not valid in a key file.
    """
    line = f"{name} sha256:{_digest(key)}"
    if not _LINE.fullmatch(line):
        raise ConfigError(
            f"{name!r} is not a valid name for a key: use at most 64 letters, digits, dots, dashes and underscores."
        )
    return line


def add_key(path: Path, name: str) -> str:
    """Adds a new key to a key file, which only the file's owner may read, and returns the key.

    Raises:
        ConfigError: The name is not valid, or is in the file already, or the file cannot be written.
    """
    key = new_key()
    line = key_line(name, key)
    if path.exists() and name in KeyFile(path).names:
        raise ConfigError(f"{path} has a key of {name!r} already. Delete its line, or choose another name.")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise ConfigError(f"{path}: the key file cannot be written: {error.strerror}.") from error
    return key


class KeyFile:
    """The admitted keys, read again whenever the file changes.

    If a changed file cannot be read, the known keys stay, and the log reports it: a typing error must neither lock all
    clients out nor admit a new one.

    Args:
        path: The key file.

    Raises:
        ConfigError: The file cannot be read, or a line is not valid.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._file_stamp()
        self._owners = self._read()

    @property
    def names(self) -> set[str]:
        """The owners of the keys."""
        return set(self._owners.values())

    def owner(self, presented: str) -> str | None:
        """Returns the owner of a key, or None. Compares with every key, in constant time."""
        self._refresh()
        digest = _digest(presented)
        found = None
        for known, name in self._owners.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _refresh(self) -> None:
        stamp = self._file_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._owners = self._read()
            _log.info("%s changed: %d keys", self._path, len(self._owners))
        except ConfigError as error:
            _log.error("The keys stay as they were: %s", error)

    def _file_stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> dict[str, str]:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._path}: the key file cannot be read: {error}.") from error
        owners = {}
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            match = _LINE.fullmatch(text)
            if not match:
                raise ConfigError(
                    f"{self._path}:{number}: expected NAME sha256:HEX. `marginrm key NAME` makes such a line."
                )
            owners[match["digest"]] = match["name"]
        return owners


@dataclass(slots=True)
class _Bucket:
    room: float
    since: float


class RateLimit:
    """A token bucket for each key: a number of requests a minute, saved up for at most one minute.

    Args:
        per_minute: Requests a minute.
        clock: Returns monotonic seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = float(per_minute)
        self._per_second = per_minute / 60
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, owner: str) -> int:
        """Counts a request; returns 0 if it may pass, otherwise the seconds until the next one may."""
        now = self._clock()
        bucket = self._buckets.setdefault(owner, _Bucket(self._most, now))
        bucket.room = min(self._most, bucket.room + (now - bucket.since) * self._per_second)
        bucket.since = now
        if bucket.room < 1:
            return max(1, math.ceil((1 - bucket.room) / self._per_second))
        bucket.room -= 1
        return 0


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
