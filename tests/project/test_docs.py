"""The pages a reader sees: short sentences, paths and commands that exist, links that lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "examples/README.md"])
PROSE = [page for page in PAGES if page.name != "CHANGELOG.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

LONGEST_SENTENCE = 30  # words
# A command of benchmarks/ writes these sections, so their wording is part of its code.
_WRITTEN = re.compile(r"<!-- (\w+): begin.*?<!-- \1: end -->", re.DOTALL)
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_ROOTS = ("src/marginrm", "service/", "training/", "tests/", "docs/", "examples/", "benchmarks/", "deploy/", "docker/")


def prose(page: Path) -> str:
    """The text of a page without code blocks and without sections that a command writes."""
    return _CODE.sub("", _WRITTEN.sub("", page.read_text(encoding="utf-8")))


def sentences(text: str) -> list[str]:
    """Sentences of running text, list items and table cells; a span of code counts as one word."""
    text = re.sub(r"`[^`]*`", "CODE", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\d+\. |#|\||:::))", text)
    parts = [part for block in blocks for part in (block.split("|") if block.lstrip().startswith("|") else [block])]
    return [sentence for part in parts for sentence in re.split(r"(?<=[.!?])[\"*)]*\s+(?=\S)", " ".join(part.split()))]


def words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PROSE, ids=[str(page.relative_to(ROOT)) for page in PROSE])
def test_no_sentence_is_longer_than_thirty_words(page: Path) -> None:
    assert [s for s in sentences(prose(page)) if words(s) > LONGEST_SENTENCE] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_row_of_a_table_is_below_its_heading(page: Path) -> None:
    """A blank line ends a table, and the rows behind it are shown as plain text."""
    lines = ["", *prose(page).splitlines(), ""]
    starts = [at for at, line in enumerate(lines) if line.startswith("|") and not lines[at - 1].startswith("|")]
    assert [lines[at] for at in starts if not re.fullmatch(r"\|[-:| ]+\|", lines[at + 1])] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PROSE, ids=[str(page.relative_to(ROOT)) for page in PROSE])
def test_paths_on_a_page_exist(page: Path) -> None:
    """Paths of the repository, in text and in commands; patterns with `*` match a file."""
    named = set(
        re.findall(r"(?<![\w./$-])((?:\w[\w.-]*/)+[\w.*-]*\w|(?:\w[\w.-]*/)+)", page.read_text(encoding="utf-8"))
    )
    ours = {path for path in named if path.startswith(_ROOTS)}
    assert sorted(path for path in ours if not list(ROOT.glob(path.rstrip("/")))) == []


@pytest.mark.parametrize("page", PROSE, ids=[str(page.relative_to(ROOT)) for page in PROSE])
def test_tests_on_a_page_exist(page: Path) -> None:
    named = re.findall(r"(tests/\w+/test_\w+\.py)::(test_\w+)", page.read_text(encoding="utf-8"))
    assert [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text("utf-8")] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_on_a_page_exist(page: Path) -> None:
    text = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
    commands = set(PROJECT["entry-points"]["marginrm.commands"])
    called = set(re.findall(r"(?:bin/|`|^\$ |^)marginrm ([a-z][a-z-]*)", text, re.MULTILINE))
    assert called - commands == set()
    modules = set(re.findall(r"-m (benchmarks(?:\.\w+)+)", text))
    files = {name: ROOT / Path(*name.split(".")) for name in modules}
    assert [name for name, path in files.items() if not path.with_suffix(".py").exists() and not path.is_dir()] == []
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {
        word for line in re.findall(r"(?:`|^)make ([a-z ]+)", text, re.MULTILINE) for word in line.split()
    } <= targets


@pytest.mark.parametrize("package", ["src/marginrm", "service/marginrm_service", "training/marginrm_training"])
def test_the_tree_of_the_architecture_page_is_the_tree_of_the_package(package: str) -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = page.partition(f"\n{package}/\n")[2].partition("\n\n")[0].partition("```")[0]
    drawn = set(re.findall(r"(?<=\s)(\w+/|\w+\.py)(?=\s)", tree + "\n"))
    modules = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    rooms = {f"{path.parent.name}/" for path in (ROOT / package).glob("*/__init__.py")}
    assert drawn == modules | rooms


def test_private_names_of_other_packages_are_listed() -> None:
    """Ruff reports every use of a private name (SLF001), so each one has a marker; `getattr` is searched for."""
    page = (ROOT / "docs/internals.md").read_text(encoding="utf-8")
    used = set()
    for path in sorted(file for root in ("src", "service", "training") for file in (ROOT / root).rglob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "noqa: SLF001" in line and "the same module" not in line:
                used |= set(re.findall(r"\.(_[a-z]\w+)", line))
            used |= set(re.findall(r"getattr\([^)]*\"(_[a-z]\w+)\"", line))
            used |= set(re.findall(r"^from [\w.]*\.(_[a-z]\w+)", line))
    assert len(used) >= 6
    assert sorted(name for name in used if name not in page) == []


def test_extras_on_a_page_exist() -> None:
    declared = PROJECT["optional-dependencies"]
    named = {
        extra
        for page in PAGES
        for listed in re.findall(r"(?:marginrm|'\.|\"\.)\[([\w,-]+)\]", page.read_text(encoding="utf-8"))
        for extra in listed.split(",")
    }
    assert {"service", "training", "data", "dev", "ray", "otel"} == named == set(declared)


def test_no_page_names_a_folder_that_a_reader_lacks() -> None:
    assert [str(page.relative_to(ROOT)) for page in PAGES if ".." + "/shared" in page.read_text(encoding="utf-8")] == []
