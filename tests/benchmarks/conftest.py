"""Texts of the demo generator, and a tiny model whose tokenizer is trained on them."""

from __future__ import annotations

import pytest

from benchmarks.harness.texts import load_texts
from benchmarks.harness.workloads import Samples
from benchmarks.models import build


@pytest.fixture(scope="session")
def texts():
    return load_texts()


@pytest.fixture(scope="session")
def tiny(texts, tmp_path_factory):
    return build("tiny", tmp_path_factory.mktemp("models"), texts.passages[:300])


@pytest.fixture
def samples(tiny, texts):
    return Samples(tiny, texts)
