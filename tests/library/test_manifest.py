"""The checkpoint's record: saved and loaded unchanged; unknown versions and fields are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marginrm.errors import ManifestError
from marginrm.manifest import MANIFEST_NAME, Calibration, EncodingInfo, GoldenSample, Manifest, revision_of


def manifest() -> Manifest:
    return Manifest(
        name="m",
        created="2026-01-01T00:00:00+00:00",
        base_model="b",
        encoding=EncodingInfo(
            architecture="decoder",
            template_hash=None,
            max_length=512,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
            pooling="last",
        ),
        calibration=Calibration(
            temperature=1.5,
            n=10,
            ece_before=0.2,
            ece_after=0.1,
            brier_before=0.3,
            brier_after=0.2,
            nll_before=0.7,
            nll_after=0.6,
        ),
        golden=[GoldenSample(prompt=[{"role": "user", "content": "hé"}], response="ja", ids=[1, 2], reward=0.1 + 0.2)],
    )


def test_a_manifest_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    manifest().save(tmp_path)
    assert Manifest.load(tmp_path) == manifest()
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]  # no temporary file is left


def test_a_checkpoint_without_a_manifest_gives_none(tmp_path: Path) -> None:
    assert Manifest.load(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema_version is 99"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"calibration": {"temperature": -1}}, "calibration.temperature"),
    ],
)
def test_a_manifest_of_another_version_is_refused_by_field(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = manifest().save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ManifestError, match=message):
        Manifest.load(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = manifest().save(tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ManifestError, match="is not valid JSON"):
        Manifest.load(tmp_path)


def test_nan_is_never_written(tmp_path: Path) -> None:
    broken = manifest().model_copy(update={"metrics": {"accuracy": float("nan")}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_revision_depends_on_the_content_alone(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is not a checkpoint"):
        revision_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    first = revision_of(tmp_path)
    assert first == revision_of(tmp_path)
    (tmp_path / "notes.txt").write_text("no part of the model")
    assert revision_of(tmp_path) == first
    manifest().save(tmp_path)
    assert revision_of(tmp_path) != first
