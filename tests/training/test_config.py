"""A run's TOML file: every key checked, every message names file, key and cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from marginrm.errors import ConfigError
from marginrm_training.config import expand, load_config

MINIMAL = 'output = "out"\n[model]\npath = "m"\n[data]\ntrain = "t.jsonl"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL))
    assert config.method.method().cap == 1.0
    assert (config.optim.learning_rate, config.optim.epochs, config.optim.pairs_per_step) == (9e-6, 1.0, 128)
    assert config.optim.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "[optim]\nlearning_rat = 1\n", "optim.learning_rat is not a setting. Did you mean 'learning_rate'"),
        (MINIMAL + "[methods]\n", "methods is not a setting. Did you mean 'method'"),
        ('output = "out"\n[model]\npath = "m"\n', "data is missing"),
        (MINIMAL + "[optim]\nepochs = 0\n", "optim.epochs: Input should be greater than 0"),
        (MINIMAL + '[method]\npreset = "margn"\n', "Choose one of: bt"),
        ("output = \n", "not valid TOML"),
    ],
)
def test_every_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text))
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load_config(tmp_path / "none.toml")


def test_overrides_replace_settings_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    config = load_config(path, ["optim.epochs=2.5", "output=runs/b", "method.preset=bt"])
    assert (config.optim.epochs, config.output, config.method.preset) == (2.5, "runs/b", "bt")
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_config(path, ["optim.epochs"])
    with pytest.raises(ConfigError, match=r"output\.x: output is a value, not a table"):
        load_config(path, ["output.x=1"])


def test_an_unset_variable_in_a_path_is_an_error() -> None:
    assert expand("plain/path") == "plain/path"
    with pytest.raises(ConfigError, match="not set"):
        expand("$MARGINRM_TEST_NEVER_SET/model")


@pytest.mark.parametrize("name", ["quickstart", "alpaca_eval"])
def test_the_examples_are_valid(name: str) -> None:
    load_config(Path(__file__).parents[2] / "examples" / f"{name}.toml")
