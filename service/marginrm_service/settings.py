"""The settings of a server: read once from the command line and `MARGINRM_*`, then frozen and passed on as values.

A field is the one source of a setting's name, default, limits and help; `cli` makes the options of them.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from marginrm.errors import ConfigError
from marginrm.process_rewards import Aggregate, StepValue
from marginrm.reading import Activation, Bos, Eos, ReadingOptions
from marginrm.text import NAME_PATTERN, Dtype

DEFAULT_MODEL = "default"
_log = logging.getLogger(__name__)
_NAMED = re.compile(rf"({NAME_PATTERN})=(.+)", re.DOTALL)
_UPSTREAM = re.compile(rf"(?:({NAME_PATTERN})=)?vllm=(https?://[^\s/?#]+(?:/[^\s?#]*)?)")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model to serve: the name that requests use, and the folder or Hub name that it is loaded from."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class UpstreamSpec:
    """A vLLM server that computes a model's rewards: the model's name, None for the only one, and the server's URL."""

    name: str | None
    url: str


@dataclass(frozen=True, slots=True)
class Option:
    """The parts of a command-line option that do not follow from its field.

    Attributes:
        names: Names of the option; by default that of the field with dashes.
        metavar: The placeholder of the value; by default its type.
        default: Text shown in place of a default of None.
    """

    names: tuple[str, ...] = ()
    metavar: str | None = None
    default: str | None = None


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


def parse_upstreams(value: Any) -> tuple[UpstreamSpec, ...]:
    """Reads `vllm=URL` or `NAME=vllm=URL`, one or several, from a list or from text with commas between.

    Raises:
        ValueError: An entry has another form, or two are for one model.
    """
    entries = value.split(",") if isinstance(value, str) else value
    specs = []
    for entry in entries:
        if isinstance(entry, UpstreamSpec):
            specs.append(entry)
            continue
        found = _UPSTREAM.fullmatch(str(entry).strip())
        if not found:
            raise ValueError(
                "give vllm=URL, such as vllm=http://10.0.0.7:8000, or NAME=vllm=URL for one of several models"
            )
        specs.append(UpstreamSpec(found[1], found[2]))
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names) or (None in names and len(names) > 1):
        raise ValueError("two upstreams are for one model; name the model of each: NAME=vllm=URL")
    return tuple(specs)


def parse_compile(value: Any) -> Any:
    """Reads the values that this setting had as a flag: true is `on`, and false is `off`."""
    known = {"true": "on", "1": "on", "false": "off", "0": "off"}
    text = str(value).lower()
    if text not in known:
        return value
    _log.warning("compile = %s is read as %s. Its values are auto, on and off.", value, known[text])
    return known[text]


class Settings(BaseSettings):
    """The server's settings. Each has an environment variable: `MARGINRM_` and the field's name in capitals."""

    model_config = SettingsConfigDict(env_prefix="MARGINRM_", frozen=True, extra="forbid")

    models: Annotated[
        tuple[ModelSpec, ...],
        NoDecode,
        BeforeValidator(parse_models),
        Option(names=("--model", "-m"), metavar="[NAME=]PATH"),
    ] = Field(
        default=(),
        description="Folder or Hugging Face Hub name of a reward model. Repeat it as NAME=PATH to serve several; requests "
        'choose one by {"model": NAME}.',
    )
    max_loaded_models: Annotated[int | None, Option(default="all")] = Field(
        default=None,
        ge=1,
        description="Most models in memory. The others are loaded when a request names them, and then the least recently "
        "used one leaves.",
    )
    upstreams: Annotated[
        tuple[UpstreamSpec, ...],
        NoDecode,
        BeforeValidator(parse_upstreams),
        Option(names=("--upstream",), metavar="[NAME=]vllm=URL"),
    ] = Field(
        default=(),
        description="A vLLM server that computes the rewards of a model, from the token ids that this server sends. The "
        "model's folder then needs no weights. Repeat it as NAME=vllm=URL for several models.",
    )
    upstream_key_file: Annotated[Path | None, Option(default="no key is sent")] = Field(
        default=None, description="File with the API key that the upstreams ask for."
    )
    host: str = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0 accepts requests from other machines."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    dtype: Dtype = Field(
        default="auto",
        description="Dtype of the backbone; the head is always float32. auto measures. With --upstream, the dtype that it "
        "computes in; auto is what vLLM takes by itself.",
    )
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(parse_compile), Option(metavar="auto|on|off")] = (
        Field(
            default="auto",
            description="Run layers through torch.compile, which is faster for large models and needs g++: on compiles "
            "before the server is ready (half a minute at the first start); auto serves at once, compiles large models in "
            "a background process, and changes over if that is faster.",
        )
    )
    deterministic: bool = Field(
        default=False,
        description="Give a text bit-identical rewards whatever is scored beside it; slower, not with --compile on.",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="Processes that share every layer of the model, each on a GPU of this machine: for a model that one GPU "
        "does not hold. The server then has one model.",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    max_length: Annotated[int | None, Option(default="the model's")] = Field(
        default=None, ge=8, description="The most tokens of a sequence."
    )
    token_budget: Annotated[int | None, Option(default="measured")] = Field(
        default=None, ge=1, description="The most tokens of one forward pass: more is faster and takes memory."
    )
    max_queue_tokens: int = Field(
        default=2_000_000, ge=1, description="Tokens that may wait per model; beyond, 429 with Retry-After."
    )
    max_queue_requests: int = Field(default=2_048, ge=1, description="Requests that may wait per model.")
    reward_cache_mib: float = Field(
        default=64.0, ge=0, allow_inf_nan=False, description="MiB of rewards to cache per model; 0 turns the cache off."
    )
    prefix_cache_mib: Annotated[float | None, Option(default="an eighth of the free memory")] = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="MiB per model for keys and values of prompts and chats, so that later requests do not compute them "
        "again; 0 turns it off. For decoders.",
    )
    prefix_cache_shared: bool = Field(
        default=False, description="Let API keys use each other's kept prefixes. Without keys, all requests do."
    )
    max_body_bytes: int = Field(
        default=32 * 2**20, ge=1_024, description="The largest request body, after decompression; beyond, 413."
    )
    body_timeout: float = Field(
        default=30.0, gt=0, description="Seconds without a byte of a request body; beyond, 408."
    )
    request_timeout: float = Field(
        default=120.0, gt=0, description="Seconds for a request without X-Request-Timeout; beyond, 504."
    )
    max_request_timeout: float = Field(default=3_600.0, gt=0, description="The longest X-Request-Timeout.")
    key_file: Annotated[Path | None, Option(default="no key is needed")] = Field(
        default=None, description="File of API keys that are admitted, as `marginrm key` makes them."
    )
    admin_key_file: Annotated[Path | None, Option(default="admin routes are off")] = Field(
        default=None, description="File of keys that may load, swap and unload models."
    )
    rate_limit: Annotated[int | None, Option(default="no limit")] = Field(
        default=None, ge=1, description="Requests a minute for each key; beyond, 429."
    )
    stall_seconds: float = Field(
        default=30.0, gt=0, description="Seconds of one forward pass after which the server is not ready until it ends."
    )
    encode_threads: int = Field(default=2, ge=1, le=64, description="Threads that tokenise.")
    drain_seconds: float = Field(
        default=30.0, ge=0, allow_inf_nan=False, description="Time to finish accepted requests after SIGTERM."
    )
    adapter_overload_status: Annotated[Literal["429", "503"], BeforeValidator(str)] = Field(
        default="503", description="Status of a full queue on other servers' routes; native routes answer 429."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run code that comes with a checkpoint. Few checkpoints need it; use it only for those you trust.",
    )
    bos: Bos = Field(
        default="auto",
        description="Beginning-of-sequence token: auto (as the chat template or the tokenizer adds it), on, off or double.",
    )
    eos: Eos = Field(
        default="auto",
        description="End-of-sequence token: auto (as the template prints it, or after plain text), on, off.",
    )
    label_weights: Annotated[str | None, Option(metavar="W,W,...")] = Field(
        default=None,
        description="Weight of each row of a head with several rows, such as -1,1; the reward is their sum.",
    )
    reward_tokens: Annotated[str | None, Option(metavar="TOKEN[,TOKEN]")] = Field(
        default=None,
        description="Tokens of a causal language model whose logit, or difference of logits, is the reward: yes,no.",
    )
    frame: Annotated[str | None, Option(metavar="NAME|FILE")] = Field(
        default=None, description="Text around query and document of a reranker: the name of a frame or a Jinja file."
    )
    head_activation: Activation | None = Field(
        default=None, description="Activation between the two layers of a head, if the checkpoint does not name it."
    )
    steps: Annotated[str | None, Option(metavar="SEPARATOR|FORM")] = Field(
        default=None,
        description="Text that ends each step, for a process reward model, or the name of a known form: qwen2.5-math-prm, "
        "math-shepherd, rlhflow-prm, skywork-o1-prm, trl-prm.",
    )
    step_value: StepValue | None = Field(
        default=None, description="A step's reward: probability (a sigmoid) or raw; by default as the form says."
    )
    aggregate: Aggregate | None = Field(
        default=None, description="How step rewards make a response's reward; by default as the form says."
    )
    log_format: Literal["text", "json"] = Field(default="text", description="Text to read, or JSON to process.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The lowest level to log."
    )

    @model_validator(mode="after")
    def _reading_is_valid(self) -> Self:
        _ = self.reading  # raises a ConfigError now rather than while a model loads
        return self

    @model_validator(mode="after")
    def _upstreams_have_models(self) -> Self:
        names = [spec.name for spec in self.models]
        for upstream in self.upstreams:
            if upstream.name is None and len(names) > 1:
                raise ValueError(
                    f"upstreams: there are several models; name the one that it computes: {names[0]}=vllm=URL"
                )
            if upstream.name is not None and names and upstream.name not in names:
                raise ValueError(f"upstreams: no model is called {upstream.name!r}; there are: {', '.join(names)}")
        return self

    def upstream_of(self, name: str) -> UpstreamSpec | None:
        """Returns the server that computes a model's rewards, or None if this one does."""
        alone = [spec.name for spec in self.models] in ([name], [])
        return next((one for one in self.upstreams if one.name == name or (one.name is None and alone)), None)

    @property
    def reading(self) -> ReadingOptions:
        """The options for checkpoints that do not say themselves how they are read; for all models.

        Raises:
            ConfigError: A value is not acceptable.
        """
        return ReadingOptions.parse(**{field.name: getattr(self, field.name) for field in fields(ReadingOptions)})

    @classmethod
    def load(cls, **given: Any) -> Settings:
        """Reads the environment. Values given here take precedence, except None.

        Raises:
            ConfigError: A value is not acceptable. The message names every such setting.
        """
        try:
            return cls(**{key: value for key, value in given.items() if value is not None})
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
                for fault in error.errors(include_url=False, include_input=False)
            ]
            raise ConfigError("; ".join(faults) + ".") from error
