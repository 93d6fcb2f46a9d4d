"""Other servers' contracts on this engine, one file each; docs/contracts.md describes what their clients send and read.

Each adapter turns its contract's request into groups of texts, and their rewards into its contract's reply.
"""

from __future__ import annotations

from fastapi import APIRouter

from marginrm_service.api.adapters import chat, embeddings, llama_factory, nemo_gym, openrlhf, rerank, slime, tei, vllm

ROUTERS = tuple(
    module.router for module in (openrlhf, slime, llama_factory, vllm, embeddings, rerank, tei, chat, nemo_gym)
)
router = APIRouter(tags=["other servers' contracts"])
for _router in ROUTERS:
    router.include_router(_router)
