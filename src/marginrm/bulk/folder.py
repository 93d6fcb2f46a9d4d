"""A folder of scored shards: what is done, for whom, and how much of it failed.

A shard appears under its name when it is complete, so a run that was killed at any moment continues with the shards that
are missing. The hidden folder `.marginrm` holds the
state (which input, model and options the shards belong to) and the counts of each shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marginrm.atomic_file import replace_file
from marginrm.bulk.lock import locked
from marginrm.bulk.summary import Summary
from marginrm.bulk.tables import Format
from marginrm.errors import ConfigError

_HIDDEN = ".marginrm"
_STATE = "state.json"
_VERSION = 1


class ShardFolder:
    """The output of a run that is written shard by shard.

    Args:
        path: The folder.
        form: Format of its files.
        work: What the shards depend on, as plain JSON values by name; the model is added when it is loaded.
        restart: Replace what is there, as soon as the new run begins.

    Raises:
        ConfigError: The folder holds shards of another input or of other options, or other files.
    """

    def __init__(self, path: Path, form: Format, work: dict[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self.form = form
        self._work = {"version": _VERSION, **work}
        self._hidden = path / _HIDDEN
        self._restart = restart
        self._state = None if restart else self._read()
        ours = self._hidden.is_dir() if restart else self._state is not None
        if not ours and path.is_dir() and any(one != self._hidden for one in path.iterdir()):
            raise ConfigError(
                f"{path}: the folder holds files, and none of a run of `marginrm score`, so it is not replaced or added "
                "to. Give an empty one."
            )
        if self._state is not None:
            self._check(self._work)

    @property
    def model(self) -> dict[str, Any] | None:
        """The model of the shards that are there, as `begin` was given it."""
        return self._state["model"] if self._state else None

    @contextmanager
    def begin(self, model: dict[str, Any], part: tuple[int, int]) -> Iterator[None]:
        """Creates the folder, or continues it, and keeps other runs from writing the same shards meanwhile.

        Args:
            model: What the rewards depend on: the model's revision and dtype.
            part: The shards of this run, as for `Sharding`.

        Raises:
            ConfigError: The shards that are there were scored by another model, or another run is writing them.
        """
        lock = self._hidden / f"{part[0]}-of-{part[1]}.lock"
        self._hidden.mkdir(parents=True, exist_ok=True)
        if self._restart:
            with locked(lock, self.path):
                self.remove()
            self._hidden.mkdir(parents=True)
        with locked(lock, self.path):
            self._state = self._read()  # another process may have begun it
            if self._state is None:
                self._state = {**self._work, "model": model}
                replace_file(self._hidden / _STATE, json.dumps(self._state, indent=1))
            self._check({**self._work, "model": model})
            yield

    def shard(self, number: int) -> Path:
        """Returns the file of a shard."""
        return self.path / f"part-{number:06d}.{self.form}"

    def done(self) -> dict[int, Summary]:
        """Returns the counts of the shards that are complete."""
        found: dict[int, Summary] = {}
        if self._state is None:
            return found
        for counts in sorted(self._hidden.glob("part-*.json")):
            number = int(counts.stem.removeprefix("part-"))
            if self.shard(number).is_file():
                found[number] = Summary.from_dict(json.loads(counts.read_bytes()))
        return found

    def write(self, number: int, content: bytes, summary: Summary) -> None:
        """Writes a shard and its counts, completely or not at all.

        Raises:
            OSError: The folder cannot be written to.
        """
        replace_file(self._hidden / f"part-{number:06d}.json", json.dumps(summary.as_dict()))
        replace_file(self.shard(number), content, beside=self._hidden)

    def finish(self) -> None:
        """Removes what killed runs have left."""
        for left in self._hidden.glob("*.new"):
            left.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        shutil.rmtree(self.path)

    def _read(self) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = json.loads((self._hidden / _STATE).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._hidden / _STATE}: cannot be read: {error}. --restart replaces it.") from error
        return state

    def _check(self, wanted: dict[str, Any]) -> None:
        assert self._state is not None  # there is a run to compare with
        differences = [
            f"{name} was {json.dumps(found)}, and is {json.dumps(given)}"
            for name, found, given in _differences(self._state, wanted)
        ]
        if differences:
            raise ConfigError(
                f"{self.path}: belongs to other work, so it cannot be continued: {'; '.join(differences)}. Give another "
                "-o, or --restart to replace it."
            )


def _differences(state: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for name, given in wanted.items():
        known = state.get(name)
        if isinstance(given, dict) and isinstance(known, dict):
            found += _differences(known, given, f"{prefix}{name}.")
        elif known != given:
            found.append((prefix + name, known, given))
    return found
