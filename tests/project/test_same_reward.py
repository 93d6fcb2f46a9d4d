"""A pair has the same reward in trainer, library and server: real weights, a real server, float32, within 1e-5."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from marginrm import RewardClient, RewardModel
from marginrm.client.options import UNLIMITED
from marginrm_training.config import parse_config
from marginrm_training.data.splits import encode_pairs, read
from marginrm_training.method.margins import MarginMethod
from marginrm_training.run.train import train
from marginrm_training.run.trainer import MarginTrainer
from support.models import CHATML_TEMPLATE, tiny_checkpoint
from support.server import serving

TOLERANCE = 1e-5
PAIRS = [
    {
        "prompt": f"Question {index}: " + "tell me more " * (index % 7),
        "chosen": "Red, yellow and blue. " * (1 + index % 5),
        "rejected": "Ask somebody else, please. " * (1 + index % 3) + str(index),
    }
    for index in range(24)
]


@pytest.fixture(scope="module", params=["gpt_neox", "qwen3", "bert"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that `marginrm train` wrote after a few steps."""
    folder = tmp_path_factory.mktemp(request.param)
    options = {} if request.param == "bert" else {"chat_template": CHATML_TEMPLATE}
    tiny_checkpoint(folder / "base", request.param, **options)
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    raw = {
        "output": str(folder / "out"),
        "model": {"path": str(folder / "base")},
        "data": {"train": str(data), "calibration_share": 0.2, "test_share": 0.2},
        "optim": {"learning_rate": 1e-3, "pairs_per_step": 8, "train_batch": 8, "epochs": 2.0},
    }
    train(parse_config(raw, "test"))
    return folder / "out"


def trainer_rewards(checkpoint: Path) -> list[float]:
    """Returns the rewards of the training loop's own forward pass, batch by batch: chosen, rejected, chosen, ..."""
    model = RewardModel.from_pretrained(checkpoint, dtype="float32")
    pairs = encode_pairs("test", read(str(checkpoint.parent / "pairs.jsonl")), model.encoder, MarginMethod()).pairs
    raw: dict[str, Any] = {
        "output": str(checkpoint.parent / "again"),
        "model": {"path": str(checkpoint)},
        "data": {"train": "unused"},
        "optim": {"train_batch": 8, "pairs_per_step": 8},
    }
    trainer = MarginTrainer(model.module, pairs, parse_config(raw, "test"), checkpoint.parent / "steps", progress=False)
    rewards: list[float] = []
    with torch.no_grad():
        for start in range(0, len(pairs), 8):
            batch = trainer.data_collator(pairs[start : start + 8])
            _, outputs = trainer.compute_loss(model.module, batch, return_outputs=True)
            rewards += outputs["rewards"].tolist()
    return rewards


def test_trainer_library_and_server_give_a_pair_the_same_reward(checkpoint: Path) -> None:
    trained = trainer_rewards(checkpoint)
    model = RewardModel.from_pretrained(checkpoint, dtype="float32")
    scored = [reward for row in PAIRS for reward in model.score(row["prompt"], [row["chosen"], row["rejected"]])]
    assert scored == pytest.approx(trained, abs=TOLERANCE)
    assert max(scored) - min(scored) > 100 * TOLERANCE  # otherwise any rewards would agree

    with (
        serving(model, reward_cache_mib=0) as server,
        httpx.Client(base_url=server.url, timeout=120, limits=UNLIMITED) as http,
        RewardClient(server.url) as client,
    ):

        def ask(row: dict[str, str]) -> list[float]:
            pair = http.post("/score", json={"pairs": [row]}).raise_for_status().json()["pairs"][0]
            return [pair["chosen"]["reward"], pair["rejected"]["reward"]]

        alone = [reward for row in PAIRS for reward in ask(row)]
        with ThreadPoolExecutor(32) as pool:  # 216 requests at once, so that steps mix them
            crowded = list(pool.map(ask, PAIRS * 9))
        bulk = client.score_pairs(PAIRS)
    assert alone == pytest.approx(scored, abs=TOLERANCE)
    for index, rewards in enumerate(crowded):
        row = index % len(PAIRS)
        assert rewards == pytest.approx(scored[2 * row : 2 * row + 2], abs=TOLERANCE)
    margins = [outcome.margin for outcome in bulk if not isinstance(outcome, Exception)]
    assert margins == pytest.approx([a - b for a, b in zip(scored[::2], scored[1::2], strict=True)], abs=2 * TOLERANCE)
