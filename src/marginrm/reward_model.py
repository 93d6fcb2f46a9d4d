"""A reward model to score with: texts or encoded groups in, rewards out. The server, the evaluation and users share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch

from marginrm import ranking
from marginrm.encoding import EncodedResponse, Encoder
from marginrm.errors import ConfigError, EncodingError, GoldenMismatchError, NonFiniteRewardError
from marginrm.forward.batch import EncodedGroup
from marginrm.forward.module import RewardModule, evaluating
from marginrm.loading import load_for_scoring
from marginrm.manifest import Manifest, revision_of
from marginrm.packing import plan_row
from marginrm.ranking import Comparison, Ranking
from marginrm.schemas import ModelInfo
from marginrm.steps import ForwardPath, plan_steps
from marginrm.text import Dtype, Prompt, Truncation
from marginrm.tuning.deterministic import make_deterministic

_ROW_MULTIPLE = 64  # tokens


def usual_token_budget(device: torch.device) -> int:
    """Returns how many tokens one forward pass computes at most where nobody has measured or said it.

    Enough for matrix products to run at full rate, little enough for activations to stay small beside the weights.
    """
    return 16384 if device.type == "cuda" else 4096


class RewardModel:
    """Scores responses with a reward model.

    Build one with `from_pretrained`, or with `from_module` around a module in memory.

    Attributes:
        module: The forward pass.
        encoder: Turns texts into token ids, as in training.
        manifest: What training recorded, or None for a plain Hugging Face checkpoint.
        info: Name, revision, dtype and calibration, as each reply of the server states them.
        token_budget: The most tokens that one forward pass computes.
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
    ) -> None:
        self.module = module
        self.encoder = encoder
        self.manifest = manifest
        self.token_budget = token_budget or usual_token_budget(module.device)
        calibration = manifest.calibration if manifest else None
        self.info = ModelInfo(
            name=name,
            revision=revision,
            base_model=base_model,
            dtype=str(module.dtype).removeprefix("torch."),
            calibrated=calibration is not None,
            temperature=calibration.temperature if calibration else 1.0,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        name: str = "default",
        dtype: Dtype = "auto",
        device: str = "auto",
        max_length: int | None = None,
        trust_remote_code: bool = False,
        token_budget: int | None = None,
        revision: str | None = None,
        compiled: bool = False,
        deterministic: bool = False,
        ignore_manifest: bool = False,
    ) -> RewardModel:
        """Loads a checkpoint that `marginrm train` wrote, or any sequence-classification reward model.

        Args:
            path: A folder or a name on the Hugging Face Hub.
            name: What replies call the model.
            dtype: Of the backbone; `auto` measures which is faster here. The head is float32 always.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            max_length: The most tokens a sequence may have; by default what the manifest or the model says.
            trust_remote_code: Whether code that comes with the checkpoint may run.
            token_budget: The most tokens that one forward pass computes; by default what is usual on the device
                (`measure_token_budget` finds what is best here, as the server does).
            revision: Branch, tag or commit on the Hub.
            compiled: Run what lies between the matrix products through `torch.compile`: faster, half a minute to load.
            ignore_manifest: Load as a checkpoint without a manifest, so that a broken one can be written again.
            deterministic: Give rewards that are the same to the bit in any company, slower (`make_deterministic`).

        Raises:
            ModelError: The checkpoint cannot be loaded or is no reward model, or rewards cannot be made deterministic.
            ConfigError: Compiled and deterministic are both asked for.
        """
        if compiled and deterministic:
            raise ConfigError("compiled and deterministic exclude each other: compiled kernels cut rows their own way.")
        manifest = Manifest.load(path) if Path(path).is_dir() and not ignore_manifest else None
        if manifest and max_length is None:
            max_length = manifest.encoding.max_length
        module, encoder = load_for_scoring(
            path,
            dtype=dtype,
            device=device,
            max_length=max_length,
            trust_remote_code=trust_remote_code,
            revision=revision,
            compiled=compiled,
            tuned=not deterministic,  # what a trial finds faster is a matter of chance, and so would be the bits
        )
        commit = getattr(module.config, "_commit_hash", None)
        model = cls(
            module,
            encoder,
            manifest,
            name=name,
            revision=revision_of(path) if Path(path).is_dir() else f"hub:{commit or revision or 'main'}",
            base_model=manifest.base_model if manifest else str(path),
            token_budget=token_budget,
        )
        if deterministic:
            make_deterministic(model)
        return model

    @classmethod
    def from_module(cls, module: RewardModule, encoder: Encoder, manifest: Manifest | None = None) -> RewardModel:
        """Wraps a module that is in memory, such as one in training."""
        base = manifest.base_model if manifest else str(getattr(module.config, "name_or_path", "") or "in memory")
        return cls(module, encoder, manifest, name="default", revision="in memory", base_model=base)

    @property
    def temperature(self) -> float:
        """T of confidence = sigmoid(margin / T); 1 without calibration."""
        return self.info.temperature

    @property
    def forward_path(self) -> ForwardPath:
        """`packed` or `padded`."""
        return self.module.forward_path

    @property
    def forward_reason(self) -> str:
        """Why that path."""
        return self.module.forward_reason

    @property
    def shares_prefixes(self) -> bool:
        """Whether what the members of a group share is computed once."""
        return self.forward_path == "packed" and self.module.architecture == "decoder"

    def score(self, prompt: Prompt, responses: Sequence[str], truncation: Truncation = "error") -> list[float]:
        """Returns one reward per response, in order.

        Raises:
            EncodingError: A response (named by its index) or the prompt is unusable.
            NonFiniteRewardError: The model gave NaN or infinity.
        """
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

    def compare(self, prompt: Prompt, chosen: str, rejected: str, tie_below: float = 0.5) -> Comparison:
        """Returns margin, confidence and verdict for two responses to a prompt. Raises as `score` does."""
        first, second = self.score(prompt, [chosen, rejected])
        return ranking.compare(first, second, self.temperature, tie_below)

    def best_of_n(
        self, prompt: Prompt, candidates: Sequence[str], top_k: int | None = None, tie_below: float = 0.5
    ) -> Ranking:
        """Ranks candidates, best first. Raises as `score` does."""
        return ranking.rank(self.score(prompt, candidates), self.temperature, tie_below, top_k)

    def score_encoded(
        self, groups: Sequence[EncodedGroup], progress: Callable[[int], object] | None = None
    ) -> list[list[float]]:
        """Scores encoded groups in as many forward passes as the token budget asks for.

        Args:
            groups: Encoded responses, those with a common prompt together.
            progress: Called after each forward pass with the number of responses it scored.

        Returns:
            Rewards in the groups' shape; NaN and infinity are returned as the model gave them.
        """
        result = [[math.nan] * len(group) for group in groups]
        ids = [[response.ids for response in group] for group in groups]
        for step in plan_steps(ids, self.token_budget, path=self.forward_path, share_prefix=self.shares_prefixes):
            rewards = self.forward([groups[part.group][part.start : part.stop] for part in step])
            found = iter(rewards)
            for part in step:
                for index in range(part.start, part.stop):
                    result[part.group][index] = next(found)
            if progress:
                progress(len(rewards))
        return result

    def forward(self, groups: Sequence[Sequence[EncodedResponse]]) -> list[float]:
        """Runs one forward pass over all these groups, whatever their size.

        Returns:
            One reward per response, groups and responses in order; NaN is returned as it is.
        """
        responses = sum(len(group) for group in groups)
        with torch.inference_mode(), evaluating(self.module):
            rewards = self.module(self.module.collate(self._filled(groups)).to(self.module.device))
        return cast("list[float]", rewards[:responses].tolist())

    def _filled(self, groups: Sequence[Sequence[EncodedResponse]]) -> Sequence[Sequence[EncodedResponse]]:
        """Adds responses that nobody reads, so that packed rows are whole multiples of some tokens.

        On CPUs oneDNN makes kernels for each length that it meets and keeps them: megabytes, and a quarter of the time
        of a pass of the demo's model in bfloat16 (docs/reliability.md). Deterministic models need it everywhere.
        """
        if self.forward_path == "padded" or not (self.module.tile or self.module.device.type == "cpu"):
            return groups
        plan = plan_row([[one.ids for one in group] for group in groups], share_prefix=self.shares_prefixes)
        missing = -len(plan.ids) % (self.module.tile or _ROW_MULTIPLE)
        typed = groups[0][0].type_ids is not None
        return [*groups, *_fillers(missing, self.encoder.max_length, typed=typed)]

    def verify_golden(self) -> float | None:
        """Scores the manifest's golden samples again.

        Returns:
            The largest difference to the recorded rewards, or None if there are no samples.

        Raises:
            GoldenMismatchError: Token ids differ, or a reward by more than the manifest's tolerance for this dtype.
        """
        if not self.manifest or not self.manifest.golden:
            return None
        samples = self.manifest.golden
        encoded = [self.encoder.encode(sample.prompt, sample.response) for sample in samples]
        for index, (sample, found) in enumerate(zip(samples, encoded, strict=True)):
            if list(found.ids) != list(sample.ids):
                raise GoldenMismatchError(
                    f"golden[{index}]: the tokenizer gives {len(found.ids)} token ids that differ from the "
                    f"{len(sample.ids)} recorded in training. Was the tokenizer or its chat template replaced?"
                )
        rewards = [rewards[0] for rewards in self.score_encoded([[response] for response in encoded])]
        differences = [abs(reward - sample.reward) for reward, sample in zip(rewards, samples, strict=True)]
        worst = max(range(len(differences)), key=lambda index: (math.isnan(differences[index]), differences[index]))
        tolerance = self.manifest.golden_tolerance.get(self.info.dtype, 0.0)
        if not differences[worst] <= tolerance:
            raise GoldenMismatchError(
                f"golden[{worst}]: reward {rewards[worst]:.6f}, recorded {samples[worst].reward:.6f}; {self.info.dtype} "
                f"may differ by {tolerance:g}. The weights are not those that were trained, or were cast to a dtype "
                "that they do not bear."
            )
        return differences[worst]


def _fillers(tokens: int, longest: int, *, typed: bool) -> Iterator[list[EncodedResponse]]:
    """Yields groups of together so many tokens, of which no two start alike."""
    for token, start in enumerate(range(0, tokens, longest)):
        length = min(tokens - start, longest)
        yield [EncodedResponse((token,) * length, (0,) * length if typed else None)]
