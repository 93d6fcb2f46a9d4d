"""The examples run with the commands in their docstrings, against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.server import serving
from support.service import FakeRewardModel

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_file_is_reranked_through_a_server(tmp_path: Path) -> None:
    model = FakeRewardModel()
    candidates = ["Yes.", "No.", "far too long " * 300]
    graded = [{"text": text, "win_prob": gold} for text, gold in zip(candidates, (0.25, 0.5, 1.0), strict=True)]
    rows = [{"prompt": f"Question {index}?", "candidates": graded} for index in range(3)]
    data = tmp_path / "groups.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with serving(model) as server:
        command = [sys.executable, EXAMPLES / "rerank_file.py", data, "--url", server.url]
        printed = subprocess.run(command, capture_output=True, text=True, check=False)
    picks = [max((0, 1), key=lambda i, row=row: model.expect(row["prompt"], candidates[i])) for row in rows]
    expected = sum((0.25, 0.5)[pick] for pick in picks) / 3
    assert "3 candidates too long" in printed.stdout, printed.stderr
    assert f"the server's pick  {expected:.4f}" in printed.stdout, printed.stderr
    assert "longest text       1.0000" in printed.stdout, printed.stderr


def test_rankings_stream_into_a_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {index}?", "candidates": ["Yes.", "No."]} for index in range(5)]
    rows.append({"prompt": "Too long?", "candidates": ["far too long " * 300]})
    groups, rankings = tmp_path / "groups.jsonl", tmp_path / "rankings.jsonl"
    groups.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = FakeRewardModel()
    with serving(model) as server:
        command = [sys.executable, EXAMPLES / "best_of_n_stream.py", groups, rankings, "--url", server.url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {line["index"]: line for line in map(json.loads, rankings.read_text(encoding="utf-8").splitlines())}
    assert sorted(found) == list(range(6))
    assert "tokens" in found.pop(5)["error"]
    for index, line in found.items():
        rewards = [model.expect(rows[index]["prompt"], text) for text in ("Yes.", "No.")]
        assert line["best"] == rewards.index(max(rewards))


def test_the_snippets_of_the_clients_page_run() -> None:
    page = (EXAMPLES.parent / "docs" / "client.md").read_text(encoding="utf-8")
    snippets = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    assert len(snippets) == 2
    with serving(FakeRewardModel()) as server:
        for snippet in snippets:
            code = snippet.replace("http://127.0.0.1:8000", server.url)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert done.stdout
