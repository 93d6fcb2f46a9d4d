"""Settings: each field is an environment variable and an option of `marginrm serve`, with one default and one help."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from marginrm.errors import ConfigError
from marginrm.reading import ReadingOptions
from marginrm_service.cli import serve, settings_of
from marginrm_service.settings import ModelSpec, Settings

# A value of each setting that is not its default, as users type it.
VALUES = {
    "models": "small=runs/a",
    "upstreams": "small=vllm=http://10.0.0.7:8000",
    "upstream_key_file": "upstream-key",
    "host": "0.0.0.0",
    "port": "9000",
    "dtype": "bfloat16",
    "compile": "off",
    "deterministic": "true",
    "device": "cuda:1",
    "tensor_parallel": "2",
    "max_length": "512",
    "token_budget": "4096",
    "max_queue_tokens": "1000",
    "max_queue_requests": "10",
    "reward_cache_mib": "0.5",
    "prefix_cache_mib": "0.25",
    "prefix_cache_shared": "true",
    "max_body_bytes": "4096",
    "body_timeout": "3",
    "request_timeout": "1.5",
    "max_request_timeout": "60",
    "key_file": "keys",
    "admin_key_file": "admin",
    "max_loaded_models": "2",
    "rate_limit": "60",
    "stall_seconds": "2.5",
    "encode_threads": "4",
    "drain_seconds": "7",
    "adapter_overload_status": "429",
    "trust_remote_code": "true",
    "bos": "off",
    "eos": "on",
    "label_weights": "-1,1",
    "reward_tokens": "yes,no",
    "frame": "bge-gemma",
    "head_activation": "tanh",
    "steps": "<extra_0>",
    "step_value": "raw",
    "aggregate": "mean",
    "log_format": "json",
    "log_level": "debug",
}


def parsed(*arguments: str) -> Settings:
    """The settings that the command loads."""
    loaded: list[Settings] = []

    def load(**given: Any) -> None:
        loaded.append(settings_of(given))

    load.__signature__ = inspect.signature(serve)
    app = typer.Typer()
    app.command()(load)
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    return loaded[0]


def option(name: str) -> list[str]:
    """The option that sets a setting to its value in `VALUES`."""
    flag = {"models": "--model", "upstreams": "--upstream"}.get(name) or "--" + name.replace("_", "-")
    return [flag] if Settings.model_fields[name].annotation is bool else [flag, VALUES[name]]


def test_every_setting_has_a_value_here():
    assert set(VALUES) == set(Settings.model_fields)


def test_options_and_environment_variables_give_the_same_settings(monkeypatch):
    by_options = parsed(*[argument for name in VALUES for argument in option(name)])
    for name, value in VALUES.items():
        monkeypatch.setenv(f"MARGINRM_{name.upper()}", value)
    assert by_options == Settings.load()
    assert by_options.models == (ModelSpec("small", "runs/a"),)
    assert by_options.admin_key_file == Path("admin")
    assert by_options.reading == ReadingOptions(
        bos="off",
        eos="on",
        label_weights=(-1.0, 1.0),
        reward_tokens=("yes", "no"),
        frame="bge-gemma",
        head_activation="tanh",
        steps="<extra_0>",
        step_value="raw",
        aggregate="mean",
        trust_remote_code=True,
    )
    defaults = Settings.model_construct()
    assert [name for name in VALUES if getattr(by_options, name) == getattr(defaults, name)] == []


def test_an_option_takes_precedence_and_others_leave_the_environment(monkeypatch):
    monkeypatch.setenv("MARGINRM_PORT", "9000")
    monkeypatch.setenv("MARGINRM_MODELS", "a=x,b=y")
    settings = parsed("--port", "1")
    assert settings.port == 1
    assert settings.models == (ModelSpec("a", "x"), ModelSpec("b", "y"))
    assert parsed("-m", "z").models == (ModelSpec("default", "z"),)


def test_the_help_shows_each_option_with_its_default():
    app = typer.Typer(rich_markup_mode=None)
    app.command()(serve)
    help_text = " ".join(CliRunner().invoke(app, ["--help"], terminal_width=200).output.split())
    for name, field in Settings.model_fields.items():
        assert option(name)[0] in help_text
        assert " ".join(field.description.split()) in help_text
    for default in ("127.0.0.1", "8000", "2000000", "64", "33554432", "the model's", "no key is needed", "503"):
        assert f"[default: ({default})]" in help_text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": "70000"}, "port: "),
        ({"adapter_overload_status": "500"}, "adapter_overload_status: "),
        ({"models": "a=x,a=y"}, "models: two models are called 'a'"),
        ({"models": "x,y"}, "models: two models are called 'default'; name each: NAME=PATH"),
        ({"colour": "red"}, "colour: "),
        ({"reward_cache_mib": "-1"}, "reward_cache_mib: "),
        ({"reward_cache_mib": "nan"}, "reward_cache_mib: "),
        ({"drain_seconds": "inf"}, "drain_seconds: "),
        ({"bos": "maybe"}, "bos: "),
        ({"label_weights": "one,two"}, "label_weights = 'one,two': give a number for each row"),
        ({"reward_tokens": "a,b,c"}, "reward_tokens = "),
    ],
)
def test_an_invalid_setting_is_named(given, message):
    with pytest.raises(ConfigError, match=message):
        Settings.load(**given)


def test_an_overload_status_may_be_a_number():
    assert Settings(adapter_overload_status=429).adapter_overload_status == "429"


@pytest.mark.parametrize(("old", "new"), [("true", "on"), ("1", "on"), ("False", "off")])
def test_compile_takes_the_values_that_it_had_as_a_flag_and_says_so(old, new, monkeypatch, caplog):
    monkeypatch.setenv("MARGINRM_COMPILE", old)
    assert Settings.load().compile == new
    assert f"is read as {new}" in caplog.text
