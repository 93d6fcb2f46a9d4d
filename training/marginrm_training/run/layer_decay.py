"""Layer-wise decay of the learning rate: the lower a layer, the smaller its steps.

With L layers, layer i of 1..L takes decay^(L - i) of the learning rate, and the embeddings take decay^L. The head and the
norm before it take all of it. Lower layers hold general features, which a small data set would overwrite (ULMFiT,
arXiv 1801.06146, section 3.2; ELECTRA, arXiv 2003.10555, appendix).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from marginrm.errors import ConfigError
from marginrm.forward.module import RewardModule
from marginrm.tuning.last_layer import layers_of


def layer_rates(module: RewardModule, decay: float) -> dict[int, float]:
    """Returns the factor on the learning rate of each parameter, by the parameter's `id`.

    Args:
        module: The model that is trained.
        decay: Factor from one layer to the one below it.

    Raises:
        ConfigError: The model does not say which modules its layers are.
    """
    layers = layers_of(module)
    if not layers:
        raise ConfigError(
            "optim.layer_decay: this model does not say which modules its layers are. Remove the setting."
        )
    above = {id(weight): len(layers) - place for place, layer in enumerate(layers, 1) for weight in layer.parameters()}
    rates: dict[int, float] = {}
    below = len(layers)  # parameters that are registered before the first layer are embeddings
    for weight in module.parameters():
        below = 0 if id(weight) in above else below
        rates[id(weight)] = decay ** above.get(id(weight), below)
    return rates


def with_layer_rates(groups: Iterable[Mapping[str, Any]], rates: Mapping[int, float]) -> list[dict[str, Any]]:
    """Splits an optimiser's parameter groups by learning rate, the largest first, since logs show the first group's.

    Args:
        groups: They have `params` and `lr`.
        rates: Of `layer_rates`.

    Raises:
        ConfigError: A parameter is not one of the model's, as under FSDP, which replaces them by flat ones.
    """
    split: dict[tuple[float, int], dict[str, Any]] = {}
    for number, group in enumerate(groups):
        for weight in group["params"]:
            rate = _rate(weight, rates)
            new = split.setdefault((-rate, number), {**group, "params": [], "lr": group["lr"] * rate})
            new["params"].append(weight)
    return [split[key] for key in sorted(split)]


def _rate(weight: Tensor, rates: Mapping[int, float]) -> float:
    if id(weight) not in rates:
        raise ConfigError(
            "optim.layer_decay does not work where weights are sharded. Remove it, or train without FSDP."
        )
    return rates[id(weight)]
