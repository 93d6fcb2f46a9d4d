"""What an operator can set: read once from the command line and `MARGINRM_*`, then frozen and passed on as values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from marginrm.errors import ConfigError
from marginrm.text import NAME_PATTERN, Dtype

DEFAULT_MODEL = "default"
_NAMED = re.compile(rf"({NAME_PATTERN})=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model to serve: the name that requests use, and the folder or Hub name that it is loaded from."""

    name: str
    path: str


def parse_models(value: Any) -> tuple[ModelSpec, ...]:
    """Reads `PATH` or `NAME=PATH`, one or several, from a list or from text with commas between.

    A single unnamed path is called `default`.

    Raises:
        ValueError: A path is empty, two models have one name, or several have no name.
    """
    entries = value.split(",") if isinstance(value, str) else value
    specs = []
    for entry in entries:
        if isinstance(entry, ModelSpec):
            specs.append(entry)
            continue
        text = str(entry).strip()
        named = None if Path(text).exists() else _NAMED.fullmatch(text)
        name, path = (named[1], named[2]) if named else (DEFAULT_MODEL, text)
        if not path:
            raise ValueError("a model's path is empty; give PATH or NAME=PATH")
        specs.append(ModelSpec(name, path))
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two models are called {twice[0]!r}; name each: NAME=PATH")
    return tuple(specs)


class Settings(BaseSettings):
    """The server's settings. Each has an environment variable: `MARGINRM_` and the field's name in capitals."""

    model_config = SettingsConfigDict(env_prefix="MARGINRM_", frozen=True, extra="forbid")

    models: Annotated[tuple[ModelSpec, ...], NoDecode, BeforeValidator(parse_models)] = Field(
        default=(), description="What to serve: PATH or NAME=PATH, several with commas between."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    dtype: Dtype = Field(default="auto", description="Of the backbone.")
    deterministic: bool = Field(default=False, description="Rewards the same to the bit in any batch.")
    compile: bool = Field(default=False, description="Compile what lies between the matrix products.")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    max_length: int | None = Field(default=None, ge=8, description="The most tokens a sequence may have.")
    token_budget: int | None = Field(default=None, ge=1, description="The most tokens of one forward pass.")
    max_queue_tokens: int = Field(default=2_000_000, ge=1, description="The most tokens that may wait per model.")
    max_queue_requests: int = Field(default=2_048, ge=1, description="The most requests that may wait per model.")
    reward_cache_mib: float = Field(
        default=64.0, ge=0, allow_inf_nan=False, description="MiB of rewards to keep per model; 0 computes each anew."
    )
    max_body_bytes: int = Field(default=32 * 2**20, ge=1_024, description="The largest request body.")
    request_timeout: float = Field(
        default=120.0, gt=0, description="Seconds for a request that does not say X-Request-Timeout itself."
    )
    max_request_timeout: float = Field(
        default=3_600.0, gt=0, description="The most seconds that a request may ask for."
    )
    key_file: Path | None = Field(default=None, description="API keys that are let in; without one, everybody is.")
    admin_key_file: Path | None = Field(
        default=None, description="Keys that may load, swap and unload models; without one, nobody may."
    )
    rate_limit: int | None = Field(default=None, ge=1, description="The most requests a minute for each key.")
    stall_seconds: float = Field(
        default=30.0, gt=0, description="Seconds of one forward pass after which the server is not ready until it ends."
    )
    encode_threads: int = Field(default=2, ge=1, le=64, description="Threads that tokenise.")
    drain_seconds: float = Field(default=30.0, ge=0, description="Time to finish accepted requests at shutdown.")
    adapter_overload_status: Literal[429, 503] = Field(
        default=503, description="What a full queue answers on the adapters' routes; native routes answer 429."
    )
    trust_remote_code: bool = Field(default=False, description="Run code that comes with a checkpoint.")
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @classmethod
    def load(cls, **given: Any) -> Settings:
        """Reads the environment; what is given here and is not None goes before it.

        Raises:
            ConfigError: A value is not acceptable. The message names every setting that is wrong.
        """
        try:
            return cls(**{key: value for key, value in given.items() if value is not None})
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
                for fault in error.errors(include_url=False, include_input=False)
            ]
            raise ConfigError("; ".join(faults) + ".") from error
