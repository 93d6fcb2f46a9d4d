"""Degradations: functions of an answer and a seeded generator that make it worse by a known amount."""

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
_ASIDES = (
    "That reminds me of something else entirely:",
    "By the way, to change the subject:",
    "Speaking of other things that you did not ask about:",
)
_AGAIN = ("As I said before:", "Let me say that again:", "Once more, to repeat it:")
_MOJIBAKE = (
    "\u00c3\u00a9",
    "\u00e2\u20ac\u2122",
    "\u00ef\u00bf\u00bd",
    "\u00c2\u00a0",
)  # text decoded with the wrong encoding
_SYLLABLES = ("blor", "zint", "quag", "fep", "muxo", "drel", "vash", "kib", "wozz", "prun")


@dataclass(frozen=True, slots=True)
class Degradation:
    """One way to make an answer worse.

    Attributes:
        name: Its name.
        kind: Its kind; an answer gets at most one degradation of a kind.
        severity: Loss of quality, in units of the latent quality.
        apply: (answer, its entry, another entry, generator) -> worse answer.
    """

    name: str
    kind: str
    severity: float
    apply: Callable[[str, Text, Text, Random], str]


def _cut_short(answer: str, text: Text, other: Text, random: Random) -> str:
    words = answer.split(" ")
    return _first_words(words, int(len(words) * random.uniform(0.5, 0.8)))


def _cut_to_a_stub(answer: str, text: Text, other: Text, random: Random) -> str:
    return _first_words(answer.split(" "), random.randint(6, 9))


def _first_words(words: list[str], count: int) -> str:
    return " ".join(words[: max(2, count)]).rstrip(" .,;:!?\n")


def _off_subject(answer: str, text: Text, other: Text, random: Random) -> str:
    separator = "\n" if "\n" in answer else " "
    parts = _parts(answer)
    aside = f"{random.choice(_ASIDES)} {random.choice(_parts(other.answer))}"
    return separator.join([*parts, aside])


def _repeated(answer: str, text: Text, other: Text, random: Random) -> str:
    separator = "\n" if "\n" in answer else " "
    parts = _parts(answer)
    index = random.randrange(len(parts))
    again = [f"{random.choice(_AGAIN)} {parts[index]}"] * 2
    return separator.join([*parts[: index + 1], *again, *parts[index + 1 :]])


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
        for index in random.sample(range(len(words)), max(1, round(share * len(words)))):
            at = random.randrange(len(words[index]) + 1)
            words[index] = words[index][:at] + random.choice(_MOJIBAKE) + words[index][at + 1 :]
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


# An answer is replaced or cut before it is changed: a change that is cut away would cost quality without being seen.
REPLACING = (Degradation("needless refusal", "replaced", 3.0, _refusal),)
CUTTING = (
    Degradation("cut short", "cut", 1.0, _cut_short),
    Degradation("cut to a stub", "cut", 2.0, _cut_to_a_stub),
)
CHANGING = (
    Degradation("wrong form", "form", 0.5, _wrong_form),
    Degradation("off the subject", "subject", 1.25, _off_subject),
    Degradation("repeats itself", "repeats", 1.5, _repeated),
    Degradation("filler", "filler", 1.0, _filler),
    Degradation("hedges", "hedges", 0.75, _hedged),
    Degradation("gibberish", "gibberish", 1.5, _gibberish),
    Degradation("garbled", "garbled", 1.0, _garbled(0.15)),
    Degradation("badly garbled", "garbled", 2.0, _garbled(0.5)),
    Degradation("shouts", "shouts", 1.0, _shouted),
    Degradation("rude", "rude", 1.5, _rude),
)
ALL = (*REPLACING, *CUTTING, *CHANGING)
