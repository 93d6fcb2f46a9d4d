"""What the service's tests share: a deterministic model without torch, and a gate to stop it with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from marginrm.encoding import EncodedResponse, Encoder
from marginrm.packing import plan_row
from marginrm.schemas import ModelInfo
from marginrm.steps import StepResult

Groups = Sequence[Sequence[EncodedResponse]]


def group(*members: Sequence[int]) -> list[EncodedResponse]:
    """A group of the token ids given."""
    return [EncodedResponse(tuple(member)) for member in members]


def sized_group(shared: int, *own: int) -> list[EncodedResponse]:
    """A group of responses with `shared` common tokens and then `own[i]` of their own, which differ at once."""
    return group(*([-1] * shared + [index] * length for index, length in enumerate(own)))


def reward_of(response: EncodedResponse) -> float:
    """What the fake model gives: it depends on the response alone, so a mix-up shows."""
    return float(hash(response.ids) % 100_003) / 1000


@dataclass
class FakeModel:
    """Scores by `reward_of`, keeps what it was given, and misbehaves on request.

    Attributes:
        on_forward: Called with the groups of each step before it is scored; may block or raise.
        poisoned: Responses that contain this token raise.
        nan_token: Responses that contain this token make every reward of the step NaN, as a bad attention mask would.
    """

    token_budget: int = 100
    forward_path: str = "packed"
    shares_prefixes: bool = True
    poisoned: int | None = None
    nan_token: int | None = None
    on_forward: Callable[[Groups], None] = lambda _: None
    steps: list[Groups] = field(default_factory=list)
    prefixes: None = None

    def cached_tokens(self, ids: Sequence[int], tenant: str | None) -> int:
        return 0

    def close(self) -> None:
        pass

    def run_step(self, groups: Groups, tenants: Sequence[str | None] | None = None) -> StepResult:
        rewards = iter(self._rewards(groups))
        plan = plan_row([[one.array for one in members] for members in groups], causal=self.shares_prefixes)
        return StepResult([list(islice(rewards, len(members))) for members in groups], list(plan.costs))

    def _rewards(self, groups: Groups) -> list[float]:
        self.steps.append(groups)
        self.on_forward(groups)
        responses = [response for members in groups for response in members]
        if any(self.poisoned in response.ids for response in responses):
            raise RuntimeError("the device says no")
        if any(self.nan_token in response.ids for response in responses):
            return [float("nan")] * len(responses)
        return [reward_of(response) for response in responses]


class Gate:
    """Holds the worker in `run_step` until it is let go, so that tests decide what waits meanwhile."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self._passes = threading.Semaphore(0)

    def __call__(self, groups: Groups) -> None:
        self.entered.release()
        assert self._passes.acquire(timeout=120)

    def open(self, steps: int = 1) -> None:
        self._passes.release(steps)


class FakeRewardModel(FakeModel):
    """A `RewardModel` for the registry: a real tokenizer, and rewards from `reward_of`."""

    def __init__(self, name: str = "default", temperature: float = 2.0, max_length: int = 512, **misbehaviour) -> None:
        from support.models import decoder_tokenizer

        super().__init__(token_budget=512, **misbehaviour)
        self.encoder = Encoder(decoder_tokenizer(), max_length=max_length, architecture="decoder")
        self.info = ModelInfo(
            name=name,
            revision="sha256:fake",
            base_model="fake",
            dtype="float32",
            calibrated=True,
            temperature=temperature,
        )
        self.forward_reason = "a fake computes nothing"
        self.manifest = None
        self.reading = None
        self.compiled = False
        self.worth_compiling = False

    def expect(self, prompt: str, response: str) -> float:
        return reward_of(self.encoder.encode(prompt, response))

    def token_of(self, text: str) -> int:
        """The id of a text that is one token, to poison responses with."""
        (token,) = self.encoder.tokenizer.encode(text, add_special_tokens=False)
        return token
