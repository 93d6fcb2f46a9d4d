"""The demo's prompts and good answers, written for it as plain text.

A file under `answers/` holds one subject. A line `Q[form]: prompt` begins an entry; the lines up to the next such line
are its good answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_ENTRY = re.compile(r"^Q\[(?P<form>[a-z]+)\]: (?P<prompt>.+)$")
LIST_FORMS = frozenset({"steps", "bullets"})


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and a good answer.

    Attributes:
        prompt: The question.
        answer: A good answer in the requested form.
        form: `plain`, `steps`, `bullets`, `yesno`, `definition`, `comparison`, `email`, `poem`.
        subject: Its file's name.
    """

    prompt: str
    answer: str
    form: str
    subject: str


@cache
def texts() -> tuple[Text, ...]:
    """Returns all entries, sorted by subject and in their order there."""
    found: list[Text] = []
    folder = files(__package__).joinpath("answers")
    for path in sorted((entry for entry in folder.iterdir() if entry.name.endswith(".txt")), key=lambda p: p.name):
        found.extend(parse(path.read_text(encoding="utf-8"), path.name.removesuffix(".txt")))
    return tuple(found)


def parse(content: str, subject: str) -> list[Text]:
    """Reads one subject's entries."""
    entries: list[tuple[str, str, list[str]]] = []
    for number, line in enumerate(content.splitlines(), 1):
        match = _ENTRY.match(line)
        if match:
            entries.append((match["form"], match["prompt"], []))
        elif entries:
            entries[-1][2].append(line)
        elif line.strip():
            raise ValueError(f"{subject}.txt:{number}: text before the first Q[form]: line")
    return [Text(prompt, "\n".join(lines).strip(), form, subject) for form, prompt, lines in entries]
