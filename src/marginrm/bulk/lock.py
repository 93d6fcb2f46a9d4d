"""A lock on an output, so that two runs never write the same rows."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from marginrm.errors import ConfigError

_log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, output: Path) -> Iterator[None]:
    """Holds the lock of an output; the system releases it when the process ends, in any way.

    A file system without locks, as some network file systems are, gives no protection.

    Args:
        path: The file to lock; it is made if it is missing.
        output: The output that it stands for, for the message.

    Raises:
        ConfigError: Another run holds it.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{output}: another `marginrm score` is writing it. Wait until it ends, or give another -o."
            ) from None
        except OSError as error:
            _log.info("%s: the file system has no locks: %s", output, error)
        yield
