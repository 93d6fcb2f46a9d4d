"""Other servers' contracts on this engine: a request becomes asks, rewards become the answer that its client reads.

One file a contract. docs/contracts.md says who sends what, and what each answer means.
"""

from __future__ import annotations

from fastapi import APIRouter, Depends

from marginrm_service.api.adapters import embeddings, llama_factory, openai, openrlhf, rerank, slime, tei, vllm
from marginrm_service.api.adapters.contract import overload_status

ROUTERS = tuple(module.router for module in (openrlhf, slime, llama_factory, vllm, embeddings, rerank, tei, openai))
router = APIRouter(dependencies=[Depends(overload_status)], tags=["other servers' contracts"])
for _router in ROUTERS:
    router.include_router(_router)
