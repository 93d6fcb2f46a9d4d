"""Errors are values: each is picklable, has its own code and field, and is never changed for another response."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

import marginrm.client.errors as client_errors
import marginrm.errors as library_errors
from marginrm.client import ItemScoreError, OverloadedError
from marginrm.encoding import Encoder
from marginrm.errors import EmptyTextError, MarginRMError, SequenceTooLongError
from support.models import decoder_tokenizer


def kinds(module: object) -> Iterator[type[MarginRMError]]:
    for kind in vars(module).values():
        if isinstance(kind, type) and issubclass(kind, MarginRMError) and kind.__module__ == module.__name__:
            yield kind


@pytest.mark.parametrize("module", [library_errors, client_errors], ids=["library", "client"])
def test_the_docstring_draws_every_error(module):
    drawn = [line.lstrip("│ ├└─").split()[0] for line in module.__doc__.split("```")[1].strip().splitlines()]
    assert sorted(drawn) == sorted(kind.__name__ for kind in kinds(module))


def test_codes_of_the_library_are_unique():
    codes = [kind.default_code for kind in kinds(library_errors)]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize(
    "error",
    [
        EmptyTextError("{param} is empty.", param="response"),
        SequenceTooLongError(4312, 2048, param="response"),
        ItemScoreError(3, "empty_text", "chosen is empty.", "a1", "chosen"),
        OverloadedError(429, "overloaded", "The queue is full.", "0b6f2f3c", 2.0),
    ],
)
def test_an_error_survives_pickling(error):
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_about_returns_a_copy():
    error = EmptyTextError("{param} is empty.", param="response")
    other = error.about("candidates[3]")
    assert (str(error), str(other)) == ("response is empty.", "candidates[3] is empty.")
    assert (other.code, other.param) == ("empty_text", "candidates[3]")


def test_a_message_is_led_by_its_field_unless_it_names_it():
    error = SequenceTooLongError(4312, 2048)
    assert str(error).startswith("4,312 tokens")
    assert str(error.for_response("chosen")).startswith("chosen: 4,312 tokens")


def test_a_prompt_error_stays_one_for_every_response():
    error = EmptyTextError("{param} is empty.", param="prompt[0].content")
    assert error.for_response("chosen").param == "prompt[0].content"


def test_each_response_of_a_bad_prompt_has_its_own_error():
    first, second = Encoder(decoder_tokenizer(), max_length=64, architecture="decoder").encode_group(
        "", ["red", "blue"]
    )
    assert first is not second
    assert str(first) == str(second) == "prompt is empty."
