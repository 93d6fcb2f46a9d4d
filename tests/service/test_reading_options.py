"""Options for checkpoints that do not say themselves how they are read, over HTTP, against transformers' own forward."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from marginrm.errors import ModelError
from marginrm_service.settings import ModelSpec
from support.models import CHATML_TEMPLATE, tiny_checkpoint, tiny_model
from support.server import serving
from support.service import FakeRewardModel


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of two classes."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("two") / "rows", "llama", chat_template=CHATML_TEMPLATE)
    tiny_model("llama", AutoTokenizer.from_pretrained(folder), num_labels=2).save_pretrained(folder)
    return folder


def test_weights_of_rows_are_served_and_shown(two_rows: Path) -> None:
    with serving(FakeRewardModel(), dtype="float32", label_weights="-1,1") as server:
        server.on_loop(server.service.registry.load(ModelSpec("m", str(two_rows))))
        body = {"model": "m", "items": [{"prompt": "Hi?", "response": "Yes."}]}
        (item,) = httpx.post(f"{server.url}/score", json=body, timeout=120).json()["items"]
        reading = httpx.get(f"{server.url}/v1/models/m").json()["reading"]
    tokenizer = AutoTokenizer.from_pretrained(two_rows)
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
    model = AutoModelForSequenceClassification.from_pretrained(two_rows, dtype=torch.float32).eval()
    with torch.inference_mode():
        first, second = model(**ids).logits[0].tolist()
    assert item["reward"] == pytest.approx(second - first, abs=1e-5)
    assert reading["options"]["label_weights"] == [-1.0, 1.0]
    assert reading["usage"] == "classifier"
    assert reading["checkpoint"] == "rows"  # not its path on the server


def test_without_weights_the_refusal_names_the_option(two_rows: Path) -> None:
    with serving(FakeRewardModel()) as server, pytest.raises(ModelError, match="label-weights"):
        server.on_loop(server.service.registry.load(ModelSpec("m", str(two_rows))))
