"""A reward model whose forward pass runs on a vLLM server. The texts' encoding, and all that is made of rewards, is ours."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from marginrm.encoding import EncodedGroup, EncodedResponse, Encoder
from marginrm.errors import ConfigError, GoldenMismatchError, MarginRMError, ModelError
from marginrm.golden import verify_golden
from marginrm.manifest import Manifest, model_info
from marginrm.schemas import ModelInfo
from marginrm.steps import StepResult
from marginrm_service.errors import UpstreamUnavailableError
from marginrm_service.settings import ModelSpec, Settings, UpstreamSpec
from marginrm_service.upstream.vllm import Served, VllmClient, read_key

if TYPE_CHECKING:
    from marginrm.loading import CheckpointFiles

_log = logging.getLogger(__name__)

_TOKEN_BUDGET = 32_768  # of one step; vLLM cuts it into batches that suit its device
_TENANTS_AT_ONCE = 8
_OTHER_MODEL_RETRY = 60  # seconds


class UpstreamModel:
    """Stands where the service otherwise has a `RewardModel`.

    Steps run on the worker thread, checks on another. A failed step or check sets `reason_down`, and only a check that
    found the known rewards clears it.

    Args:
        client: The server that computes.
        served: What it says of itself.
        encoder: The checkpoint's encoder.
        manifest: What training recorded, or None.
        info: The model's part of replies.
        token_budget: The most tokens of one step.

    Attributes:
        encoder: As given.
        manifest: As given.
        info: As given.
        token_budget: As given.
        golden: Largest difference of a golden reward at load; None without golden samples.
        reason_down: Why the server must not be used now, in words; None while it may be.
    """

    # What is true of every model here, under the names of `RewardModel`.
    forward_path = "upstream"
    forward_reason = "a vLLM server computes raw logits from token ids; layout and caches are its own"
    shares_prefixes = False  # its prefix cache is not seen from here, so every token counts as work
    compiled = False
    prefixes = None
    readout = None
    reading = None

    def __init__(
        self,
        client: VllmClient,
        served: Served,
        encoder: Encoder,
        manifest: Manifest | None,
        info: ModelInfo,
        *,
        token_budget: int = _TOKEN_BUDGET,
    ) -> None:
        self.encoder = encoder
        self.manifest = manifest
        self.info = info
        self.token_budget = token_budget
        self.golden: float | None = None
        self.reason_down: str | None = None
        self._client = client
        self._served = served
        self._reference: tuple[list[EncodedResponse], list[float]] | None = None
        self._pool = ThreadPoolExecutor(_TENANTS_AT_ONCE, thread_name_prefix=f"upstream-{info.name}")

    @classmethod
    def load(cls, spec: ModelSpec, upstream: UpstreamSpec, settings: Settings) -> UpstreamModel:
        """Loads everything but the weights, and checks the server's rewards.

        Raises:
            ModelError: The checkpoint cannot be read, is not a decoder's, or the server does not compute its rewards.
            UpstreamRefusedError: The server does not answer as vLLM does.
            ConfigError: A setting does not go with an upstream.
            UpstreamUnavailableError: The server does not answer.
        """
        from marginrm.loading import find_checkpoint, load_encoder

        if settings.deterministic or settings.compile == "on" or settings.tensor_parallel > 1:
            raise ConfigError(
                f"model {spec.name!r} has an upstream, whose forward pass is its own: leave out --deterministic, "
                "--compile on and --tensor-parallel, or give the upstream's own options for them."
            )
        with contextlib.ExitStack() as unless_loaded:
            client = client_of(upstream, settings)
            unless_loaded.callback(client.close)
            served = client.served()
            files = find_checkpoint(spec.path, weights=False)
            manifest = Manifest.load(files.folder)
            encoder = load_encoder(
                files,
                most_tokens=served.max_length,
                max_length=settings.max_length,
                reading=settings.reading,
                manifest=manifest,
            )
            info = model_info(
                manifest,
                name=spec.name,
                revision=files.revision(),
                base_model=manifest.base_model if manifest else spec.path,
                dtype=settings.dtype if settings.dtype != "auto" else _dtype_of(files),
            )
            model = cls(client, served, encoder, manifest, info, token_budget=settings.token_budget or _TOKEN_BUDGET)
            model.golden = model.verify_golden()
            model.remember_rewards()
            unless_loaded.pop_all()
        if manifest and manifest.uncertainty:
            _log.warning(
                "Model %r: its rewards come without their uncertainty, which is read from hidden states", spec.name
            )
        return model

    def remember_rewards(self) -> None:
        """Keeps the server's rewards of a few texts, so that another model in its place is noticed.

        Raises:
            ModelError: Its values are probabilities.
            UpstreamUnavailableError, UpstreamRefusedError: As `VllmClient.rewards`.
        """
        from marginrm.forward.self_check import conversations

        texts = [one for group in conversations(self.encoder) for one in group]
        rewards = self._rewards(texts)
        if not (self.manifest and self.manifest.golden) and all(0 <= reward <= 1 for reward in rewards):
            ids = [one.array.tolist() for one in texts]
            if self._client.rewards(ids, self._served.name, activation=True) == rewards:
                raise ModelError(
                    "The upstream gives values between 0 and 1 whether its activation is asked for or not, so they may be "
                    "probabilities. Rewards must be raw logits: use a vLLM that knows `use_activation` (0.32 does)."
                )
        self._reference = texts, rewards

    def verify_golden(self) -> float | None:
        """Has the manifest's golden samples scored by the server, as `RewardModel.verify_golden`.

        Raises:
            GoldenMismatchError: It gives other rewards.
            UpstreamUnavailableError, UpstreamRefusedError: As `VllmClient.rewards`.
        """
        return verify_golden(self.manifest, self.encoder, self.info.dtype, self._rewards)

    def run_step(self, groups: Sequence[EncodedGroup], tenants: Sequence[str | None] | None = None) -> StepResult:
        """Has groups scored by the server: one request for each tenant, whose prefixes it keeps apart.

        Args:
            groups: Encoded responses.
            tenants: For each group the name under which the server keeps its prefixes; None and the empty name are one.

        Raises:
            UpstreamUnavailableError, UpstreamRefusedError: As `VllmClient.rewards`.
        """
        self.check_available()
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, tenant in enumerate(tenants or [None] * len(groups)):
            numbers[tenant or ""].append(number)
        parts = {tenant: [one for number in found for one in groups[number]] for tenant, found in numbers.items()}
        try:
            scored = list(self._pool.map(self._rewards, parts.values(), parts))
        except UpstreamUnavailableError:
            self.check()  # now rather than in a moment, so that what waits is not tried one by one
            raise
        result = StepResult([[] for _ in groups], [sum(one.tokens for one in group) for group in groups])
        for found, rewards in zip(numbers.values(), map(iter, scored), strict=True):
            for number in found:
                result.rewards[number] = list(islice(rewards, len(groups[number])))
        return result

    def cached_tokens(self, ids: NDArray[np.int32], tenant: str | None) -> int:
        """Returns 0: which tokens the server has kept is not known here."""
        return 0

    def check_available(self) -> None:
        """Returns if the server may be used.

        Raises:
            UpstreamUnavailableError: It may not.
        """
        if self.reason_down is not None:
            raise UpstreamUnavailableError(f"Model {self.info.name!r} cannot score now: {self.reason_down}")

    def check(self) -> None:
        """Asks the server for its health, and for rewards that are known if it was down. Sets `reason_down`."""
        try:
            self._client.check_health()
            if self.reason_down is not None:
                self._recognise()
        except MarginRMError as error:
            self._mark_down(str(error))
        else:
            if self.reason_down is not None:
                _log.info("Model %r: its upstream is back and gives the same rewards", self.info.name)
            self.reason_down = None

    def close(self) -> None:
        """Ends the threads and connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _recognise(self) -> None:
        """Checks that a server that has come back computes the same model.

        Raises:
            GoldenMismatchError, ModelError: It does not.
            UpstreamUnavailableError, UpstreamRefusedError: As `VllmClient.rewards`.
        """
        from marginrm.forward.self_check import TOLERANCE

        self._served = self._client.served()
        if self._served.max_length < self.encoder.max_length:
            raise ModelError(
                f"the upstream came back with a limit of {self._served.max_length:,} tokens, below the "
                f"{self.encoder.max_length:,} of this model."
            )
        self.verify_golden()
        assert self._reference is not None  # `load` has made it
        texts, known = self._reference
        for reward, before in zip(self._rewards(texts), known, strict=True):
            if not abs(reward - before) <= TOLERANCE[self.info.dtype] * max(1.0, abs(before)):
                raise GoldenMismatchError(
                    f"the upstream came back with other rewards: {reward:.6f} where it gave {before:.6f} before. Start it "
                    "with the same weights and dtype, or load this model again."
                )

    def _rewards(self, responses: Sequence[EncodedResponse], tenant: str = "") -> list[float]:
        # A hash, so that requests to the server tell no tenant's name.
        salt = hashlib.blake2b(tenant.encode(), digest_size=16).hexdigest() if tenant else None
        return self._client.rewards([one.array.tolist() for one in responses], self._served.name, salt=salt)

    def _mark_down(self, reason: str) -> None:
        if self.reason_down is None:
            _log.error("Model %r cannot score: %s", self.info.name, reason)
        self.reason_down = reason


def client_of(upstream: UpstreamSpec, settings: Settings) -> VllmClient:
    """Returns the client of an upstream.

    Raises:
        ConfigError: The file of its key cannot be used.
    """
    return VllmClient(upstream.url, read_key(settings.upstream_key_file), seconds=settings.request_timeout)


def _dtype_of(files: CheckpointFiles) -> str:
    """Returns the dtype that vLLM takes for a checkpoint by itself: half precision as it was saved, else float16."""
    saved = str(files.config.get("dtype") or files.config.get("torch_dtype") or "").removeprefix("torch.")
    return saved if saved in ("bfloat16", "float16") else "float16"
