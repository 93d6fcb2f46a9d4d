"""Ways to make a good answer worse by a known amount. Each is a pure function of the answer and a seeded generator."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from marginrm_training.demo.texts import LIST_FORMS, Text

_RUDE = (
    "What a stupid question.",
    "Anyone with half a brain knows this.",
    "Stop wasting my time, you fool.",
    "Do your own homework, idiot.",
    "I can't believe you are too lazy to look this up.",
)
_FILLER = (
    "well, you know, at the end of the day,",
    "as it were, so to speak, and in a manner of speaking,",
    "it goes without saying that, all things considered,",
    "basically, to be perfectly honest,",
    "for what it is worth, when all is said and done,",
)
_HEDGES = (
    "I am not sure, but maybe",
    "I could be completely wrong here, but perhaps",
    "This is only a wild guess, but possibly",
)
_REFUSALS = (
    "I am sorry, but I cannot help with that request.",
    "As an assistant I am not able to answer this.",
    "I would rather not talk about this topic. Please ask somebody else.",
)
_SYLLABLES = ("blor", "zint", "quag", "fep", "muxo", "drel", "vash", "kib", "wozz", "prun")


@dataclass(frozen=True, slots=True)
class Degradation:
    """One way to spoil an answer.

    Attributes:
        name: What it does.
        kind: Of one kind, an answer gets at most one.
        severity: How much quality it costs, in units of the latent quality.
        apply: (answer, its entry, another entry, generator) -> worse answer.
    """

    name: str
    kind: str
    severity: float
    apply: Callable[[str, Text, Text, Random], str]


def _cut_short(share: float) -> Callable[[str, Text, Text, Random], str]:
    def apply(answer: str, text: Text, other: Text, random: Random) -> str:
        words = answer.split(" ")
        keep = max(2, int(len(words) * (share + random.uniform(-0.08, 0.08))))
        return " ".join(words[:keep]).rstrip(" .,;:!?\n")

    return apply


def _off_subject(answer: str, text: Text, other: Text, random: Random) -> str:
    return other.answer


def _repeated(times: int) -> Callable[[str, Text, Text, Random], str]:
    def apply(answer: str, text: Text, other: Text, random: Random) -> str:
        separator = "\n" if "\n" in answer else " "
        parts = _parts(answer)
        index = random.randrange(len(parts))
        return separator.join(parts[: index + 1] + [parts[index]] * times + parts[index + 1 :])

    return apply


def _rude(answer: str, text: Text, other: Text, random: Random) -> str:
    phrase = random.choice(_RUDE)
    return f"{phrase} {answer}" if random.random() < 0.5 else f"{answer} {phrase}"


def _filler(answer: str, text: Text, other: Text, random: Random) -> str:
    words = answer.split(" ")
    for phrase in random.sample(_FILLER, 2):
        words.insert(random.randrange(len(words) + 1), phrase)
    return " ".join(words)


def _hedged(answer: str, text: Text, other: Text, random: Random) -> str:
    return f"{random.choice(_HEDGES)} {answer[:1].lower()}{answer[1:]}"


def _garbled(share: float) -> Callable[[str, Text, Text, Random], str]:
    def apply(answer: str, text: Text, other: Text, random: Random) -> str:
        words = answer.split(" ")
        long = [index for index, word in enumerate(words) if len(word) > 3]
        for index in random.sample(long, max(1, int(share * len(long)))):
            letters = list(words[index])
            random.shuffle(letters)
            words[index] = "".join(letters)
        return " ".join(words)

    return apply


def _wrong_form(answer: str, text: Text, other: Text, random: Random) -> str:
    if text.form in LIST_FORMS:
        return " ".join(re.sub(r"^(\d+\.|-)\s*", "", line) for line in answer.split("\n"))
    return "\n".join(f"- {part}" for part in _parts(answer))


def _refusal(answer: str, text: Text, other: Text, random: Random) -> str:
    return random.choice(_REFUSALS)


def _shouted(answer: str, text: Text, other: Text, random: Random) -> str:
    return answer.upper().replace(".", "!")


def _gibberish(answer: str, text: Text, other: Text, random: Random) -> str:
    words = answer.split(" ")
    for _ in range(5):
        word = "".join(random.choice(_SYLLABLES) for _ in range(2))
        words.insert(random.randrange(len(words) + 1), word)
    return " ".join(words)


def _parts(answer: str) -> list[str]:
    """Splits an answer into its lines, or its sentences if it has one line."""
    if "\n" in answer:
        return answer.split("\n")
    return [part for part in re.split(r"(?<=[.!?]) ", answer) if part]


# An answer is first replaced, then changed, then cut: the order in which they apply.
REPLACING = (
    Degradation("off the subject", "replaced", 2.0, _off_subject),
    Degradation("needless refusal", "replaced", 3.0, _refusal),
)
CHANGING = (
    Degradation("wrong form", "form", 0.5, _wrong_form),
    Degradation("repeats itself", "repeats", 1.5, _repeated(3)),
    Degradation("filler", "filler", 1.0, _filler),
    Degradation("hedges", "hedges", 0.75, _hedged),
    Degradation("gibberish", "gibberish", 1.5, _gibberish),
    Degradation("garbled", "garbled", 1.0, _garbled(0.15)),
    Degradation("badly garbled", "garbled", 2.0, _garbled(0.5)),
    Degradation("shouts", "shouts", 1.0, _shouted),
    Degradation("rude", "rude", 1.5, _rude),
)
CUTTING = (
    Degradation("cut short", "cut", 1.0, _cut_short(0.75)),
    Degradation("cut very short", "cut", 2.0, _cut_short(0.4)),
)
ALL = (*REPLACING, *CHANGING, *CUTTING)
