"""The wire shapes: requests that are accepted, requests that are refused, and the content of replies."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from marginrm import schema_examples as examples
from marginrm.schemas import (
    BestOfNRequest,
    BestOfNResponse,
    ErrorBody,
    ErrorReply,
    RankedOut,
    ResponseOut,
    ScoreRequest,
    ScoreResponse,
)

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("shape", "example"),
    [
        (ScoreRequest, examples.SCORE_REQUEST),
        (BestOfNRequest, examples.BEST_OF_N_REQUEST),
        (ScoreResponse, examples.SCORE_RESPONSE),
        (BestOfNResponse, examples.BEST_OF_N_RESPONSE),
        (ErrorReply, examples.ERROR_REPLY),
    ],
)
def test_the_examples_of_the_api_page_are_valid(shape, example) -> None:
    assert shape.model_validate(example).model_dump(mode="json", exclude_unset=True) == example


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"pairs": [], "items": []},
        {"pairs": [PAIR], "surprise": 1},
        {"pairs": [{**PAIR, "extra": 1}]},
        {"pairs": [{"prompt": "p", "chosen": "a"}]},
        {"pairs": [PAIR], "tie_below": 0.49},
        {"pairs": [PAIR], "tie_below": 1.0},
        {"pairs": [PAIR], "tie_below": "0.6"},
        {"pairs": [PAIR], "tie_below": float("nan")},
        {"pairs": [PAIR], "truncation": "right"},
        {"pairs": [{**PAIR, "id": 7}]},
        {"pairs": [{**PAIR, "id": "\ud800"}]},
    ],
)
def test_a_wrong_shape_refuses_the_request(body) -> None:
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate(body)


@pytest.mark.parametrize("text", [None, 3, "", "\ud800", ["x"]])
def test_an_unusable_text_does_not_refuse_the_request(text) -> None:
    assert ScoreRequest.model_validate({"pairs": [{**PAIR, "chosen": text}]}).pairs[0].chosen == text


@pytest.mark.parametrize(
    "change", [{"top_k": 0}, {"prompts": []}, {"prompts": [{"prompt": "p", "candidates": []}]}, {"return_text": 1}]
)
def test_best_of_n_refuses_an_unusable_request(change) -> None:
    body = {"prompts": [{"prompt": "p", "candidates": ["a"]}]}
    BestOfNRequest.model_validate(body)
    with pytest.raises(ValidationError):
        BestOfNRequest.model_validate({**body, **change})


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reply_holds_no_nan(reward: float) -> None:
    with pytest.raises(ValidationError):
        ResponseOut(reward=reward, tokens=1, truncated=False)


def test_absent_fields_are_left_out() -> None:
    assert ErrorBody(code="c", message="m").model_dump() == {"code": "c", "message": "m"}
    ranked = RankedOut(candidate=0, rank=1, reward=1.0, p_best=1.0)
    assert ranked.model_dump() == {"candidate": 0, "rank": 1, "reward": 1.0, "p_best": 1.0}
