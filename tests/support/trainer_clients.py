"""Runs the trainers' own client functions, taken from checkouts of their repositories, against a URL.

A program of its own: it runs in an environment with aiohttp, requests, pydantic and dacite. It reads one JSON object from
stdin, `{"url", "sources": {file: text}, "sent": {...}}`, and prints what each function returns. Nothing of the
trainers' code is kept here: the functions are found by name in the sources given, and called.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import json
import logging
import random
import sys
import types
import typing
from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import aiohttp
import dacite
import pydantic
import requests

Simple = SimpleNamespace


def module_of(file: str, source: str, names: set[str], **given: Any) -> types.ModuleType:
    """Executes the functions and classes of a source that have these names, in a module with the globals given.

    A name such as `Class.method` takes one method as a function.
    """
    module = types.ModuleType(file)
    sys.modules[file] = module
    module.__dict__.update({name: getattr(typing, name) for name in typing.__all__} | given)
    found: list[ast.stmt] = []
    for node in ast.parse(source).body:
        name = getattr(node, "name", None)
        if name in names:
            found.append(node)
        elif isinstance(node, ast.ClassDef):
            found += [one for one in node.body if f"{name}.{getattr(one, 'name', None)}" in names]
    assert len(found) == len(names), (file, names)
    exec(compile(ast.Module(found, []), file, "exec"), module.__dict__)
    return module


async def openrlhf(source: str, url: str, sent: dict[str, Any]) -> Any:
    module = module_of(
        "openrlhf",
        source,
        {"AgentExecutorBase", "SingleTurnAgentExecutor"},
        ABC=ABC,
        abstractmethod=abstractmethod,
        asyncio=asyncio,
        aiohttp=aiohttp,
        deepcopy=deepcopy,
        logger=logging.getLogger("openrlhf"),
    )
    executor = module.SingleTurnAgentExecutor([f"{url}/get_reward"] * 2)
    return await executor._fetch_rewards_via_http(sent["query"], sent["prompts"], sent["labels"])


async def slime(source: str, url: str, sent: list[dict[str, Any]]) -> Any:
    module = module_of(
        "slime",
        source,
        {"remote_rm", "_get_shared_session"},
        asyncio=asyncio,
        aiohttp=aiohttp,
        random=random,
        Sample=object,
        _shared_session=None,
        logger=logging.getLogger("slime"),
    )
    args = Simple(rm_url=f"{url}/slime")
    rewards = [await module.remote_rm(args, Simple(**sample), max_retries=1) for sample in sent]
    await module._get_shared_session().close()
    return rewards


async def llama_factory(source: str, url: str, sent: list[str]) -> Any:
    given = {"requests": requests, "json": json, "torch": Simple(Tensor=list)}
    module = module_of("llama_factory", source, {"get_rewards_from_server"}, **given)
    return await asyncio.to_thread(module.get_rewards_from_server, f"{url}/v1/score/evaluation", sent)


async def verl(source: str, url: str, sent: str) -> Any:
    names = {"RewardLoopWorker._post_request", "RewardLoopWorker.compute_score_disrm"}
    given = {"aiohttp": aiohttp, "asyncio": asyncio, "DataProto": object, "logger": logging.getLogger("verl")}
    module = module_of("verl", source, names, **given)

    async def text(data: Any) -> str:
        return sent

    rewards = []
    for engine in ("vllm", "sglang"):
        rollout = Simple(name=engine)
        model = Simple(path="/models/Skywork-Reward")
        config = Simple(reward_model=Simple(rollout=rollout, model=model))
        # Version 0.10 has the reward model's configuration in another place than 0.8.
        config.reward = Simple(reward_model=Simple(rollout=rollout, model_path=model.path, model=model))
        worker = Simple(config=config, reward_router_address=url.removeprefix("http://"))
        worker._preprocess_reward_inputs = text
        worker._post_request = types.MethodType(module._post_request, worker)
        rewards.append((await module.compute_score_disrm(worker, None))["reward_score"])
    return rewards


verl_0_8 = verl


async def nemo_gym(source: str, url: str, sent: dict[str, Any]) -> Any:
    async def checked(response: aiohttp.ClientResponse) -> None:
        response.raise_for_status()

    given = {"ServerClient": object, "GenRMStrategyConfig": object, "raise_for_status": checked}
    module = module_of("nemo_gym", source, {"GenRMStrategy"}, **given)
    names = ("agent_names", "num_generations_per_prompt", "policy_model_server_name", "genrm_compare_server_name")
    strategy = module.GenRMStrategy(Simple(**dict.fromkeys(names)))
    compact = functools.partial(json.dumps, separators=(",", ":"), ensure_ascii=False)
    async with aiohttp.ClientSession() as session:

        def post(*, url_path: str, json: Any, **_: str) -> Any:  # nemo_gym/server_utils.py sends orjson's bytes
            return session.post(url + url_path, data=compact(json), headers={"Content-Type": "application/json"})

        client = Simple(post=post)
        return await strategy.compare(sent["conversation_history"], sent["response_objs"], client, sent["principle"])


async def ms_swift(sources: list[str], url: str, sent: list[dict[str, Any]]) -> Any:
    kinds = "InferRequest RequestConfig ChatCompletionRequestMixin MultiModalRequestMixin ChatCompletionRequest Model"
    kinds += " ModelList UsageInfo Function ChatCompletionMessageToolCall ChatMessage ChatCompletionResponseChoice"
    kinds += " ChatCompletionResponse random_uuid"
    protocol = module_of(
        "ms_swift_protocol",
        sources[0],
        set(kinds.split()),
        dataclass=dataclass,
        field=field,
        fields=fields,
        asdict=asdict,
        deepcopy=deepcopy,
        **{name: __import__(name) for name in ("base64", "io", "json", "os", "time", "uuid")},
        np=None,
        Image=Simple(Image=bytes),
        Messages=list,
        Tool=dict,
        NumpyArray=object,
        BaseModel=pydantic.BaseModel,
        remove_response=None,
    )
    given = {name: getattr(protocol, name) for name in kinds.split()}
    given |= {"aiohttp": aiohttp, "json": json, "deepcopy": deepcopy, "asdict": asdict, "from_dict": dacite.from_dict}
    given |= {"InferEngine": object, "Metric": object, "ChatCompletionStreamResponse": object, "HTTPError": OSError}
    client = module_of("ms_swift", sources[1], {"InferClient"}, **given).InferClient(base_url=f"{url}/v1")
    models = await client.get_model_list_async()
    reply = await client.infer_async(protocol.InferRequest(messages=sent), model=models.data[0].id)
    return float(reply.choices[0].message.content.strip("[]"))


async def main() -> dict[str, Any]:
    given = json.load(sys.stdin)
    sources, url, sent = given["sources"], given["url"], given["sent"]
    return {name: await globals()[name](source, url, sent[name]) for name, source in sources.items()}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())))
