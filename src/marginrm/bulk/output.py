"""The output that a command line names: one file that is continued row by row, one file of shards, or their folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Self

from marginrm.bulk.run import Sharding
from marginrm.bulk.tables import Format, format_of
from marginrm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go.

    Attributes:
        path: The file or the folder.
        form: Its format.
        shards: The folder of shards; None for a file that is written row by row.
        part: The shards of this process, as for `Sharding`.
    """

    path: Path
    form: Format
    shards: Path | None
    part: tuple[int, int] = (0, 1)

    @classmethod
    def of(cls, name: str, form: Format, shard: str | None, *, sharded: bool, restart: bool) -> Self:
        """Reads the options of a command line.

        Args:
            name: The output. It is a folder if it ends with a slash, or is one.
            form: Format of the shards of a folder.
            shard: `I/N`, or None.
            sharded: Write a JSON Lines file in shards too, because several processes score it.
            restart: An output that is there will be replaced.

        Raises:
            ConfigError: The suffix is not one of an output, `shard` has another form or needs a folder, a complete
                file is there, or each process of several would replace what the others write.
        """
        path = Path(name)
        if restart and shard is not None:
            raise ConfigError(
                f"--shard {shard} with --restart: each process would remove the shards of the others. Remove {path} once, "
                "and start them without --restart."
            )
        if name.endswith("/") or path.is_dir():
            return cls(path, form, path, _part(shard))
        found = format_of(name)
        if shard is not None:
            raise ConfigError(f"--shard {shard}: several processes fill one folder of shards. Give -o {name}/ instead.")
        if found is None and not sharded:
            return cls(path, "jsonl", None)
        shards = path.with_name(f"{path.name}.shards")
        if path.exists() and not shards.exists() and not restart:
            raise ConfigError(
                f"-o {name}: is complete, or of another run. Give another file, or --restart to replace it."
            )
        return cls(path, found or "jsonl", shards)

    def check(self, places: Sequence[str]) -> None:
        """Checks that the output can be written, and is not one of the inputs or among their files.

        Raises:
            ConfigError: It cannot, or it is.
        """
        if not self.path.absolute().parent.is_dir():
            raise ConfigError(
                f"-o {self.path}: the folder {self.path.parent} does not exist. Make it, or give another path."
            )
        if self.path.exists() and any(Path(place).exists() and self.path.samefile(place) for place in places):
            raise ConfigError(f"-o {self.path} is the input. Give another file.")
        path = self.path.resolve()
        for place in places:
            whole = Path(place).resolve()
            if (whole.is_dir() and path.is_relative_to(whole)) or (has_magic(place) and path.match(str(whole))):
                raise ConfigError(
                    f"-o {self.path} is among the files of the input {place}, so a run that continues would read its own "
                    "rows. Give a path outside of it."
                )

    @property
    def in_shards_only(self) -> bool:
        """Whether the output is a folder, or a file of a format that is written in shards only."""
        return self.path == self.shards or self.form != "jsonl"

    @property
    def complete(self) -> bool:
        """Whether this process has the whole output."""
        return self.part == (0, 1)

    @property
    def order(self) -> Path:
        """The file of the order for labelling, beside the output."""
        name = self.path.name.removesuffix(f".{self.form}")
        return self.path.with_name(f"{name}.by-uncertainty.jsonl")

    def sharding(self, rows: int) -> Sharding:
        """Returns the shards of the output, each of so many rows."""
        return Sharding(
            form=self.form, rows=rows, part=self.part, whole=None if self.path == self.shards else self.path
        )


def _part(shard: str | None) -> tuple[int, int]:
    if shard is None:
        return 0, 1
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--shard {shard}: give I/N, such as 0/4 to 3/4.")
    return int(index), int(count)
