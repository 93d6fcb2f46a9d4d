"""Begin and end of a decoder's sequence: BOS, EOS, padding that is not read, and a token that is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from marginrm.encoding.frames import Frame
from marginrm.encoding.token_ids import Ids
from marginrm.errors import ConfigError
from marginrm.process_rewards import StepReading
from marginrm.reading import Eos

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from marginrm.encoding.rendering import Renderer

BosPolicy = Literal["single", "auto", "on", "off", "double"]


@dataclass(frozen=True, slots=True)
class EncodingPolicy:
    """Begin and end of a decoder's sequences. The defaults are those that marginrm trains with.

    Attributes:
        bos: `single`: exactly one BOS where the tokenizer or the template puts one. The other values are those of
            `ReadingOptions`.
        eos: As in `ReadingOptions`.
        unread: Token ids that the checkpoint's library passes over at the end of a sequence (its padding token), so
            that it reads the reward before them. They are left out: later tokens do not change earlier ones.
        appended: The token whose position is read, put after the text, or None.
        frame: A reranker's text, in place of a conversation.
        steps: How a process reward model's steps are read; None for one reward per response.
    """

    bos: BosPolicy = "single"
    eos: Eos = "auto"
    unread: frozenset[int] = frozenset()
    appended: int | None = None
    frame: Frame | None = None
    steps: StepReading | None = None


class SpecialTokens:
    """Puts the special tokens of a policy around token ids.

    Args:
        tokenizer: Names the tokens.
        backend: Its `tokenizers` back end, to see what is added to plain text.
        renderer: To see what the template prints.
        policy: What is wanted.

    Attributes:
        leading_bos: How many BOS tokens the sequences of this model start with; None where none are put or taken away.
        ends_in_eos: Whether an EOS is put after a text that does not end in one.
        added_by_tokenizer: Whether the tokenizer itself adds special tokens to the rendered text.

    Raises:
        ConfigError: The policy asks for a token that the tokenizer lacks.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, renderer: Renderer, policy: EncodingPolicy
    ) -> None:
        for name, value in (("bos", policy.bos), ("eos", policy.eos)):
            if value in ("on", "double") and getattr(tokenizer, f"{name}_token_id") is None:
                raise ConfigError(f"{name} = {value}: this checkpoint's tokenizer has no {name.upper()} token.")
        self._bos, self._eos, self._policy = tokenizer.bos_token_id, tokenizer.eos_token_id, policy
        self.added_by_tokenizer = policy.bos == "auto" and renderer.chat_template is None
        self.ends_in_eos = self._eos is not None and (policy.eos == "on" or (policy.eos == "auto" and renderer.plain))
        self.leading_bos = self._count_leading(backend, renderer)

    def put(self, ids: Ids, *, rendered_here: bool) -> tuple[Ids, int]:
        """Gives a sequence its BOS, its end and nothing that is not read.

        Args:
            ids: Token ids of a text.
            rendered_here: Whether the text was rendered here. A client's text may lack the BOS that its own template
                prints; what is rendered here has what `auto` gives it.

        Returns:
            The ids, and by how many places their content moved to the right.
        """
        count = None if rendered_here and self._policy.bos == "auto" else self.leading_bos
        moved = 0
        if count is not None and self._bos is not None:
            has = self.count(ids)
            moved = count - has
            if moved:
                ids = np.concatenate([np.full(count, self._bos, np.int32), ids[has:]])
        if self.ends_in_eos:
            ids = _ending_in(ids, self._eos)
        if self._policy.appended is not None:
            ids = _ending_in(ids, self._policy.appended)
        end = len(ids)
        while end > 1 and ids[end - 1] in self._policy.unread:
            end -= 1
        return ids[:end], moved

    def count(self, ids: Ids) -> int:
        """Returns how many BOS tokens the ids start with."""
        if self._bos is None:
            return 0
        return next((index for index, one in enumerate(ids) if one != self._bos), len(ids))

    def _count_leading(self, backend: Tokenizer, renderer: Renderer) -> int | None:
        if self._bos is None:
            return None
        if self._policy.bos not in ("auto", "single"):
            return {"on": 1, "off": 0, "double": 2}[self._policy.bos]
        added = self.count(np.array(backend.encode("a", add_special_tokens=True).ids))
        printed = self.count(np.array(backend.encode(renderer.sample(), add_special_tokens=False).ids))
        if self._policy.bos == "auto":
            return added if self.added_by_tokenizer else printed
        return 1 if added or printed else None


def _ending_in(ids: Ids, token: int) -> Ids:
    return ids if len(ids) and ids[-1] == token else np.append(ids, np.int32(token))
