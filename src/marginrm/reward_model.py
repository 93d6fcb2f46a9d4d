"""A reward model to score with: texts or encoded groups in, rewards out. Server, evaluation and users share it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from marginrm import ranking
from marginrm.calibration import Floats
from marginrm.encoding import EncodedGroup, EncodedResponse, Encoder
from marginrm.errors import (
    ConfigError,
    EmptyTextError,
    EncodingError,
    HeadError,
    NonFiniteRewardError,
)
from marginrm.forward.module import Readout, RewardModule, evaluating
from marginrm.golden import verify_golden
from marginrm.head_posterior import Features, HeadPosterior, no_features
from marginrm.loading import find_checkpoint
from marginrm.loading.ranks import Ranks, load_in_processes
from marginrm.manifest import Manifest, model_info
from marginrm.prefix_cache import PrefixCache, StepPrefixes
from marginrm.prefix_cache.memory import default_bytes
from marginrm.process_rewards import StepReading
from marginrm.ranking import Comparison, Ranking
from marginrm.reading import CheckpointReading, ReadingOptions
from marginrm.steps import ForwardPath, GroupSlice, PrefixUse, StepResult, plan_steps, reusable
from marginrm.text import Dtype, Prompt, Response, Truncation
from marginrm.tuning import compiled as compilation
from marginrm.tuning.token_budget import default_token_budget, measure_token_budget, out_of_memory

# Row lengths on CPUs: oneDNN makes kernels for each length that it meets and keeps them, megabytes each, and making
# them takes a quarter of a pass of the demo's model in bfloat16 (docs/reliability.md).
_ROW_MULTIPLE = 64  # tokens


class RewardModel:
    """Scores responses with a reward model.

    Build one with `from_pretrained`, or with `from_module` around a module in memory.

    Attributes:
        module: The forward pass.
        encoder: Turns texts into token ids, as in training.
        manifest: What training recorded, or None for a plain Hugging Face checkpoint.
        info: Name, revision, dtype and calibration, as each reply of the server states them.
        token_budget: Tokens that one forward pass computes at most, padding included; a single longer response exceeds it.
        row_multiple: Packed rows are filled to a multiple of so many tokens.
        reading: What the checkpoint is and how it is read; None for a module in memory.
        prefixes: Keys and values of prefixes that are kept across steps; None if nothing is kept.
        readout: Makes rewards carry their uncertainty; None for plain rewards.
    """

    def __init__(
        self,
        module: RewardModule,
        encoder: Encoder,
        manifest: Manifest | None,
        *,
        name: str,
        revision: str,
        base_model: str,
        token_budget: int | None = None,
        reading: CheckpointReading | None = None,
        prefix_cache_bytes: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.module = module
        self._ranks = ranks
        self.encoder = encoder
        self.manifest = manifest
        self.reading = reading
        self.readout: Readout | None = None
        self.token_budget = token_budget or default_token_budget(module.device)
        self.row_multiple = _ROW_MULTIPLE if module.device.type == "cpu" else 1
        token_bytes = module.execution.prefix_bytes
        fits = token_bytes and prefix_cache_bytes >= token_bytes
        self.prefixes = PrefixCache(prefix_cache_bytes, token_bytes) if fits and token_bytes else None
        dtype = str(module.dtype).removeprefix("torch.")
        self.info = model_info(manifest, name=name, revision=revision, base_model=base_model, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        name: str = "default",
        dtype: Dtype | torch.dtype = "auto",
        device: str = "auto",
        max_length: int | None = None,
        trust_remote_code: bool = False,
        reading: ReadingOptions | None = None,
        token_budget: int | None = None,
        revision: str | None = None,
        compiled: bool = False,
        deterministic: bool = False,
        ignore_manifest: bool = False,
        prefix_cache_mib: float | None = 0,
        tensor_parallel: int = 1,
    ) -> RewardModel:
        """Loads a checkpoint that `marginrm train` wrote, or any other reward model that gives one reward to a response.

        Args:
            path: A folder or a name on the Hugging Face Hub.
            name: The model's name in replies.
            dtype: The backbone's dtype; `auto` measures which is faster here. The head is always float32.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            max_length: The most tokens a sequence may have; by default what the manifest or the model says.
            trust_remote_code: Whether code that comes with the checkpoint may run; as in `reading`.
            reading: What you say about a checkpoint that does not say it itself: BOS and EOS, which rows or tokens are
                the reward, a reranker's text.
            token_budget: Tokens that one forward pass computes at most, padding included; only a single longer response
                exceeds it. By default the device's default (`measure_token_budget` finds the best, as the server does).
            revision: Branch, tag or commit on the Hub.
            compiled: Run the layers through `torch.compile`: faster for large models, half a minute to load. Off unless
                asked for: a library starts no compiler in the background, as the server does.
            deterministic: Give batch-invariant rewards (`tuning.deterministic`); slower.
            ignore_manifest: Load as a checkpoint without a manifest, so that a broken one can be written again.
            prefix_cache_mib: MiB of keys and values to keep of what was scored, so that later calls do not compute the
                same prompt again; 0 keeps nothing, None takes an eighth of the memory that is free after loading. The
                weights must not change afterwards.
            tensor_parallel: Number of processes, each with a share of every layer, for a model that one GPU does not hold;
                with CUDA each takes a GPU of this machine. One such model in a process.

        Raises:
            ModelError: The checkpoint cannot be loaded or is not a reward model, or deterministic rewards are not
                possible.
            ConfigError: Both compiled and deterministic are asked for, or either with tensor_parallel.
        """
        if compiled and deterministic:
            raise ConfigError(
                "compiled and deterministic exclude each other: compiled kernels choose their own shapes."
            )
        if tensor_parallel > 1 and (compiled or deterministic):
            raise ConfigError("tensor_parallel excludes compiled and deterministic: layers are shared among processes.")
        options = reading or ReadingOptions()
        if trust_remote_code:
            options = replace(options, trust_remote_code=True)
        files = find_checkpoint(path, revision)
        manifest = None if ignore_manifest else Manifest.load(files.folder)
        if manifest and max_length is None:
            max_length = manifest.encoding.max_length
        wanted: dict[str, Any] = {
            "path": files,
            "dtype": dtype,
            "device": device,
            "max_length": max_length,
            "reading": options,
            "manifest": manifest,
            "purpose": "deterministic_scoring" if deterministic else "compiled_scoring" if compiled else "scoring",
        }
        with ThreadPoolExecutor(1, "hash") as pool:  # hashing takes seconds and leaves the interpreter to others
            found = pool.submit(files.revision)
            loaded, ranks = load_in_processes(tensor_parallel, wanted)
        model = cls(
            loaded.module,
            loaded.encoder,
            manifest,
            name=name,
            revision=found.result(),
            base_model=manifest.base_model if manifest else str(path),
            token_budget=token_budget,
            reading=loaded.reading,
            prefix_cache_bytes=(
                default_bytes(loaded.module.device) if prefix_cache_mib is None else int(prefix_cache_mib * 2**20)
            ),
            ranks=ranks,
        )
        if manifest and manifest.uncertainty:
            model.read_uncertainty(HeadPosterior.load(files.folder, manifest.uncertainty.sha256))
        return model

    @classmethod
    def from_module(cls, module: RewardModule, encoder: Encoder, manifest: Manifest | None = None) -> RewardModel:
        """Wraps a module that is in memory, such as one in training; its mode stays as it is between forward passes.

        No prefixes are kept, since its weights may change.
        """
        base = manifest.base_model if manifest else str(getattr(module.config, "name_or_path", "") or "in memory")
        return cls(module, encoder, manifest, name="default", revision="in memory", base_model=base)

    @property
    def temperature(self) -> float:
        """T of confidence = sigmoid(margin / T); 1 without calibration."""
        return self.info.temperature

    @property
    def steps(self) -> StepReading | None:
        """How the steps of a response are read; None unless this is a process reward model."""
        return self.encoder.policy.steps

    @property
    def forward_path(self) -> ForwardPath:
        """`packed`, `padded` or `one_at_a_time`."""
        return self.module.forward_path

    @property
    def forward_reason(self) -> str:
        """Why that path, and how packed rows are computed here, in words."""
        shared = f"; every layer shared among {self._ranks.size} processes" if self._ranks else ""
        if self.prefixes is None:
            return self.module.forward_reason + shared
        return f"{self.module.forward_reason}; prefixes kept across steps, up to {self.prefixes.max_bytes / 2**20:,.0f} MiB"

    @property
    def compiled(self) -> bool:
        """Whether its layers are compiled."""
        return self.module.execution.compiled

    @property
    def worth_compiling(self) -> bool:
        """Whether compiled layers may be faster, so that a trial is worth its time: large models on CPUs."""
        return self._ranks is None and compilation.may_pay(self.module)

    @property
    def shares_prefixes(self) -> bool:
        """Whether what the members of a group share is computed once."""
        return self.forward_path == "packed" and self.module.architecture == "decoder"

    @property
    def no_features(self) -> str | None:
        """Why the inputs of the head's last linear layer cannot be read; None if they can."""
        return no_features(self.module, self.steps)

    def score(self, prompt: Prompt, responses: Sequence[Response], truncation: Truncation = "error") -> list[float]:
        """Returns one reward per response, in order.

        A process reward model takes a response as text or as a list of steps (`StepReading.split`), and its rewards are
        `StepReward`: floats with the attribute `steps`.

        Raises:
            EncodingError: There is no response, or a response (named by its index) or the prompt is unusable.
            NonFiniteRewardError: The model gave NaN or infinity.
        """
        if not responses:
            raise EmptyTextError("{param} is an empty list. Give at least one response.", param="responses")
        encoded = []
        for index, outcome in enumerate(self.encoder.encode_group(prompt, responses, truncation)):
            if isinstance(outcome, EncodingError):
                raise outcome.for_response(f"responses[{index}]")
            encoded.append(outcome)
        rewards = self.score_encoded([encoded])[0]
        for index, reward in enumerate(rewards):
            if not math.isfinite(reward):
                raise NonFiniteRewardError(f"The model gave {reward} for responses[{index}].")
        return rewards

    def compare(self, prompt: Prompt, chosen: Response, rejected: Response, tie_below: float = 0.5) -> Comparison:
        """Returns margin, confidence and verdict for two responses to a prompt. Raises as `score` does."""
        first, second = self.score(prompt, [chosen, rejected])
        return ranking.compare(first, second, self.temperature, tie_below)

    def best_of_n(
        self,
        prompt: Prompt,
        candidates: Sequence[Response],
        top_k: int | None = None,
        tie_below: float = 0.5,
        *,
        risk_averse: float = 0.0,
    ) -> Ranking:
        """Ranks candidates, best first. Raises as `score` does.

        Args:
            prompt: The prompt that they answer.
            candidates: The responses to rank.
            top_k: Number of candidates in the ranking; all by default.
            tie_below: The result is a tie if the confidence is below this in both directions.
            risk_averse: k of the order by reward - k std, where the checkpoint says how sure its rewards are.

        Raises:
            NoUncertaintyError: `risk_averse` is not 0, and the checkpoint does not say that.
        """
        return ranking.rank(
            self.score(prompt, candidates),
            self.temperature,
            tie_below,
            top_k,
            groups=self.info.groups,
            risk_averse=risk_averse,
        )

    def score_encoded(
        self, groups: Sequence[EncodedGroup], progress: Callable[[int], object] | None = None
    ) -> list[list[float]]:
        """Scores encoded groups in as many forward passes as the token budget requires.

        Args:
            groups: Encoded responses, those with a common prompt together.
            progress: Called after each forward pass with the number of responses it scored.

        Returns:
            Rewards in the groups' shape; NaN and infinity are returned as the model gave them.
        """
        tenants = [""] * len(groups)
        return self._run(groups, self._planned(groups, tenants), progress, tenants).rewards

    def read_uncertainty(self, posterior: HeadPosterior) -> None:
        """Makes rewards carry their uncertainty from now on.

        Raises:
            HeadError: As for `score_features`, or the posterior is that of another layer.
        """
        posterior.check(self.module, self.steps)
        self.readout = posterior.to(self.module.device)

    def score_features(
        self, groups: Sequence[EncodedGroup], progress: Callable[[int], object] | None = None
    ) -> tuple[list[list[float]], list[Floats]]:
        """Scores encoded groups, and returns the inputs of the head's last linear layer beside the rewards.

        Args:
            groups: As for `score_encoded`.
            progress: As for `score_encoded`.

        Returns:
            Rewards in the groups' shape, and for each group its features, float64, [responses, size].

        Raises:
            HeadError: The head does not end in a linear layer that gives the reward, or the model reads steps.
        """
        reason = self.no_features
        if reason:
            raise HeadError(f"The inputs of the head cannot be read: {reason}.")
        kept, self.readout = self.readout, Features()
        try:
            scored = self.score_encoded(groups, progress)
        finally:
            self.readout = kept
        return [list(map(float, group)) for group in scored], Features.of(scored)

    def run_step(self, groups: Sequence[EncodedGroup], tenants: Sequence[str | None] | None = None) -> StepResult:
        """Computes groups together, whatever their size: in one forward pass if packed.

        Otherwise it takes as many forward passes as the token budget requires.

        Args:
            groups: Encoded responses, those with a common prompt together; no group is empty.
            tenants: For each group the name under which its prefixes are read and kept, so that names never share any;
                None for a group, or for all, neither reads nor keeps.
        """
        names = tenants or [None] * len(groups)
        whole = [[GroupSlice(number, 0, len(group)) for number, group in enumerate(groups)]]
        steps = whole if self.forward_path == "packed" else self._planned(groups, names)
        return self._run(groups, steps, None, names)

    def cached_tokens(self, ids: NDArray[np.int32], tenant: str | None) -> int:
        """Returns how many first tokens of a sequence need not be computed now. Thread-safe.

        Args:
            ids: Token ids, as far as they may come from a cache (`steps.reusable`).
            tenant: As for `run_step`.
        """
        return 0 if self.prefixes is None or tenant is None else self.prefixes.cached_tokens(ids, tenant)

    def measure_token_budget(self) -> int:
        """Sets the token budget that suits this machine, after nine forward passes at most, and returns it."""
        default = default_token_budget(self.module.device)
        self.token_budget = measure_token_budget(partial(self._computed, prefixes=None), self.encoder, default)
        return self.token_budget

    def _planned(self, groups: Sequence[EncodedGroup], tenants: Sequence[str | None]) -> Iterator[list[GroupSlice]]:
        ids = [[response.array for response in group] for group in groups]
        cached: list[int] = []
        if self.prefixes:
            named = zip(groups, tenants, strict=True)
            cached = [self.cached_tokens(group[0].array[: reusable(group)], tenant) for group, tenant in named]
        path, share = self.forward_path, self.shares_prefixes
        return plan_steps(ids, self.token_budget, path=path, share_prefix=share, cached=cached)

    def _run(
        self,
        groups: Sequence[EncodedGroup],
        steps: Iterable[Sequence[GroupSlice]],
        progress: Callable[[int], object] | None,
        tenants: Sequence[str | None],
    ) -> StepResult:
        result = StepResult([[math.nan] * len(group) for group in groups], [0] * len(groups))
        for step in steps:
            now = [groups[part.group][part.start : part.stop] for part in step]
            flat, costs, used = self._forward(now, [tenants[part.group] for part in step])
            result.prefixes += used
            rewards = iter(flat)
            for part, cost in zip(step, costs, strict=True):
                result.rewards[part.group][part.start : part.stop] = itertools.islice(rewards, part.stop - part.start)
                result.computed[part.group] += cost
            if progress:
                progress(len(flat))
        return result

    def _forward(
        self, groups: Sequence[EncodedGroup], tenants: Sequence[str | None]
    ) -> tuple[list[float], tuple[int, ...], PrefixUse]:
        """Runs one forward pass over groups of any size.

        Returns:
            Rewards in order, tokens computed for each group, and what the prefix cache gave.
        """
        if self.prefixes is None or not any(tenant is not None for tenant in tenants):
            return *self._computed(groups, None), PrefixUse()
        try:
            with self.prefixes.step(groups, tenants) as step:
                rewards, costs = self._computed(groups, step)
                if all(math.isfinite(reward) for reward in rewards):  # keys and values may be at fault, too
                    step.commit()
        except RuntimeError as error:
            if out_of_memory(error):
                self.prefixes.clear()
            raise
        return rewards, costs, step.use

    def _computed(
        self, groups: Sequence[EncodedGroup], prefixes: StepPrefixes | None
    ) -> tuple[list[float], tuple[int, ...]]:
        batch = self.module.collate(groups, multiple=self.row_multiple, prefixes=prefixes)
        together = self._ranks.step(groups, self.row_multiple) if self._ranks else nullcontext()
        with together, torch.inference_mode(), evaluating(self.module):
            output = self.module(batch.to(self.module.device), self.readout)
            values: list[float] = self.readout.rewards(output) if self.readout else output.tolist()
        responses = [response for group in groups for response in group]
        if all(response.read_at is None for response in responses):
            return values, batch.costs
        steps = self.steps
        assert steps is not None  # its encoder says where steps are read
        rest = iter(values)
        return [steps.reward(list(itertools.islice(rest, one.values))) for one in responses], batch.costs

    def close(self) -> None:
        """Ends the other processes of a tensor-parallel model; without effect on others. They end with this one, too."""
        if self._ranks:
            self._ranks.close()

    def verify_golden(self) -> float | None:
        """Scores the manifest's golden samples again.

        Returns:
            The largest difference to the recorded rewards, or None if there are no samples.

        Raises:
            GoldenMismatchError: Token ids differ, or a reward by more than the manifest's tolerance for this dtype.
        """

        def score(responses: Sequence[EncodedResponse]) -> list[float]:
            nameless = [None] * len(responses)  # neither reads nor keeps prefixes
            groups = [[response] for response in responses]
            return [one[0] for one in self._run(groups, self._planned(groups, nameless), None, nameless).rewards]

        return verify_golden(self.manifest, self.encoder, self.info.dtype, score)
