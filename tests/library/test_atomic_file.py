"""Files written whole: the old content or the new one, whatever happens between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from marginrm.atomic_file import replace_file, replacing, share_weights


def test_a_writer_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    replace_file(target, "old é")

    def fail() -> None:
        with replacing(target) as fresh:
            fresh.write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == "old é".encode()


def test_two_writers_of_one_file_do_not_share_their_new_files(tmp_path: Path) -> None:
    target, beside = tmp_path / "a.json", tmp_path / "hidden"
    beside.mkdir()
    with replacing(target, beside=beside) as first, replacing(target, beside=beside) as second:
        first.write_text("first", encoding="utf-8")
        second.write_text("second", encoding="utf-8")
        assert sorted(beside.iterdir()) == sorted([first, second])
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "first"  # its block ended last
    assert list(beside.iterdir()) == []


def test_weights_get_the_mode_of_the_other_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0o640)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    share_weights(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
