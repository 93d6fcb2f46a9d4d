"""Preference pairs that a tiny model learns at once, and the settings of a run over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOOD = ("Red, yellow and blue.", "Paris is the capital.", "Put it into boiling water.", "Yeast eats sugar.")
BAD = ("No.", "I do not know.", "Ask somebody else, please.", "0123456789")


def rows(count: int) -> list[dict[str, Any]]:
    """Two pairs per prompt, with strengths."""
    return [
        {
            "prompt": f"Question {index // 2}: what is it?",
            "chosen": GOOD[index % 4],
            "rejected": BAD[(index + index // 4) % 4],
            "strength": 0.6 + 0.3 * (index % 2),
        }
        for index in range(count)
    ]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    """Writes rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def config_file(
    folder: Path, pairs: int, *, name: str = "run", eval_every: int = 0, **sections: dict[str, Any]
) -> Path:
    """Writes a run over `pairs` training pairs with files of its own to calibrate and report on; output `folder/name`.

    Sections given win over the default ones, key by key. The backbone is expected in `folder/base`.
    """
    data = {"train": str(write(folder / f"train{pairs}.jsonl", rows(pairs)))}
    for split in ("calibration", "test"):
        held = [row | {"prompt": f"{split} {row['prompt']}"} for row in rows(16)]
        data[split] = str(write(folder / f"{split}.jsonl", held))
    tables: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "base")},
        "data": data,
        "method": {"preset": "margin"},
        "optim": {"learning_rate": 1e-2, "pairs_per_step": 16, "train_batch": 16, "epochs": 2.0},
    }
    lines = [
        f"output = {json.dumps(str(folder / name))}",
        "log_every = 1",
        "save_every = 4",
        f"eval_every = {eval_every}",
    ]
    for section, settings in tables.items():
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in (settings | sections.get(section, {})).items()]
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
