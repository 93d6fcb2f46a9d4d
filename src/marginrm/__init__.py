"""marginrm: margin-aware reward models, trained, calibrated and served with one forward pass.

```python
from marginrm import RewardClient, RewardModel

model = RewardModel.from_pretrained("checkpoints/demo")  # needs marginrm[service] or marginrm[training]
model.score("What is 2 + 2?", ["4", "5"])

client = RewardClient("http://127.0.0.1:8000")  # needs no torch
client.score("What is 2 + 2?", ["4", "5"])
```

Names are imported on first use, so that a client starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marginrm import errors
    from marginrm.client import AsyncRewardClient, RewardClient
    from marginrm.errors import MarginRMError
    from marginrm.manifest import Manifest
    from marginrm.ranking import Comparison, RankedCandidate, Ranking
    from marginrm.reward_model import RewardModel

    __version__: str

__all__ = [
    "AsyncRewardClient",
    "Comparison",
    "Manifest",
    "MarginRMError",
    "RankedCandidate",
    "Ranking",
    "RewardClient",
    "RewardModel",
    "__version__",
    "errors",
]

_HOMES = {
    "AsyncRewardClient": "client",
    "Comparison": "ranking",
    "Manifest": "manifest",
    "MarginRMError": "errors",
    "RankedCandidate": "ranking",
    "Ranking": "ranking",
    "RewardClient": "client",
    "RewardModel": "reward_model",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("marginrm")
    elif name == "errors":
        value = import_module("marginrm.errors")
    elif name in _HOMES:
        value = getattr(import_module(f"marginrm.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'marginrm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
