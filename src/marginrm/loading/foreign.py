"""Errors of transformers, tokenizers, safetensors and peft, as marginrm's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from safetensors import SafetensorError

from marginrm.errors import MarginRMError, ModelError


@contextmanager
def translated(name: object, part: str) -> Iterator[None]:
    """Turns foreign errors into a ModelError that names the checkpoint and the part.

    Args:
        name: The checkpoint, as its user gave it.
        part: The part that is read, such as `tokenizer`.

    Raises:
        ModelError: A foreign error was raised inside.
    """
    try:
        yield
    except MarginRMError:
        raise
    except (
        AssertionError,
        IndexError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        RuntimeError,
        SafetensorError,
        UnpicklingError,
        ImportError,
        TypeError,
        NotImplementedError,
    ) as error:
        reason = " ".join(str(error).split())[:400]
        raise ModelError(f"Cannot load the {part} of {name}: {type(error).__name__}: {reason}") from error
    except Exception as error:
        # The tokenizers library raises bare Exception for a broken tokenizer.json; anything else is a bug and goes on.
        if type(error) is not Exception:
            raise
        raise ModelError(f"Cannot load the {part} of {name}: {error}") from error
