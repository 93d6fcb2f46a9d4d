"""Compiled layers give the rewards that they gave before, through one graph for all of them and for every row."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from marginrm import RewardModel
from marginrm.compiler import CACHE_VARIABLE
from marginrm.errors import ConfigError
from marginrm.forward.execution import Choice
from marginrm.forward.module import RewardModule
from marginrm.loading import load_for_scoring
from marginrm.tuning import compiled, packed_weights
from marginrm.tuning.compile_ahead import Skeleton, build
from marginrm.tuning.tune import tune
from support.forward import groups_of
from support.models import tiny_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch's own, as it imports its compiler
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs"),
]
AHEAD = "from marginrm.tuning import compile_ahead as ahead; ahead._NICE = 0; ahead.main()"
LAYERS = 13  # more than torch's limit of 8 recompilations


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of compiled code, filled by another process, as a server does it."""
    folder = tmp_path_factory.mktemp("inductor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder))
        patch.setattr(packed_weights, "_WORTH_IT", 0.0)
        yield folder


@pytest.fixture(scope="module")
def checkpoint(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    del cache
    return tiny_checkpoint(tmp_path_factory.mktemp("models"), "qwen3", num_hidden_layers=LAYERS)


@pytest.fixture
def eager(checkpoint: Path) -> RewardModule:
    return load_for_scoring(checkpoint, dtype="float32", device="cpu").module


def rewards_of(module: RewardModule, count: int) -> torch.Tensor:
    groups = groups_of(module.base.config.vocab_size) * count
    with torch.inference_mode():
        rewards: torch.Tensor = module(module.collate(groups, multiple=64))
        return rewards


def test_another_process_compiles_into_the_cache_without_the_weights(eager: RewardModule, cache: Path) -> None:
    skeleton = Skeleton.of(eager)
    assert skeleton is not None
    assert skeleton.packed
    with subprocess.Popen([sys.executable, "-c", AHEAD], stdin=subprocess.PIPE) as process:
        assert process.stdin
        process.stdin.write(skeleton.to_json() + b"\n")
        process.stdin.flush()
        assert process.wait(600) == 0
    assert any(cache.rglob("*.so"))
    torch.compiler.reset()
    counters.clear()

    compiled.apply(eager)
    rewards_of(eager, 1)

    assert counters["stats"]["unique_graphs"] == 1


def test_all_layers_and_rows_of_any_length_use_one_graph(eager: RewardModule) -> None:
    expected = [rewards_of(eager, count) for count in (1, 2, 3, 9)]
    torch.compiler.reset()
    counters.clear()
    assert tune(eager, "compiled_scoring").compiled
    assert counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        found = [rewards_of(eager, count) for count in (1, 2, 3, 9)]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for rewards, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(rewards, wanted, atol=1e-5, rtol=0)


def test_compiled_rewards_are_those_of_texts_scored_eagerly_and_training_is_not_compiled(checkpoint: Path) -> None:
    responses = ["Blue.", "Blue, like the sky on a clear day.", "No."]
    plain = RewardModel.from_pretrained(checkpoint, dtype="float32").score("Name a colour.", responses)
    model = RewardModel.from_pretrained(checkpoint, dtype="float32", compiled=True)
    assert "layers compiled" in model.forward_reason
    assert model.score("Name a colour.", responses) == pytest.approx(plain, abs=1e-5)

    module = load_for_scoring(checkpoint, dtype="float32", purpose=None).module
    compiled.apply(module)
    module(module.collate(groups_of(module.base.config.vocab_size))).sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in module.parameters() if weight.grad is not None)


@pytest.mark.parametrize(("worth_it", "taken"), [(0.0, True), (float("inf"), False)])
def test_a_trial_keeps_what_is_faster_and_changes_nothing_before(
    eager: RewardModule, monkeypatch: pytest.MonkeyPatch, worth_it: float, taken: bool
) -> None:
    monkeypatch.setattr(compiled, "_WORTH_IT", worth_it)
    choice, pieces = finished(eager)
    assert choice.taken == taken == eager.execution.compiled
    assert "the eager forward's speed" in choice.reason
    assert pieces > 4


def finished(module: RewardModule) -> tuple[Choice, int]:
    trial = compiled.trial(module, groups_of(module.base.config.vocab_size))
    pieces = 0
    while True:
        try:
            next(trial)
        except StopIteration as end:
            choice: Choice = end.value
            return choice, pieces
        pieces += 1
        assert not module.execution.compiled


def test_a_family_whose_layers_cannot_be_one_graph_stays_eager(
    eager: RewardModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = type(eager.backbone.get_submodule("layers.0"))
    own = layer.forward

    def breaking(self: object, hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        print(end="", flush=True)  # a graph cannot hold it
        return own(self, hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", breaking)
    choice, _ = finished(eager)
    assert not choice.taken
    assert "torch.compile failed" in choice.reason
    with pytest.raises(ConfigError, match="does not work here"):
        compiled.try_it(eager)
    assert not eager.execution.compiled


def test_without_a_compiler_the_cure_is_told(eager: RewardModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no-such-compiler.*without --compile"):
        compiled.try_it(eager)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mistral", "bert", "modernbert"])
def test_a_skeleton_has_the_layers_of_its_model(tmp_path: Path, family: str) -> None:
    module = load_for_scoring(tiny_checkpoint(tmp_path, family), dtype="float32", device="cpu").module
    skeleton = Skeleton.of(module)
    assert skeleton is not None
    made = build(skeleton)

    def shapes(one: RewardModule) -> dict[str, tuple[str, torch.Size]]:
        return {name: (type(part).__name__, part.weight.shape) for name, part in named_linear(one)}

    assert shapes(made) == shapes(module)
    assert rewards_of(made, 1).isfinite().all()


def named_linear(module: RewardModule) -> list[tuple[str, torch.nn.Linear]]:
    parts = module.backbone.named_modules()
    return [(name, part) for name, part in parts if isinstance(part, torch.nn.Linear)]


def test_compiled_code_is_kept_at_home_whatever_was_imported_before() -> None:
    program = "import torch._dynamo; from marginrm.compiler import use_cache_folder; print(use_cache_folder())"
    environment = {name: value for name, value in os.environ.items() if name != CACHE_VARIABLE}
    printed = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)
    assert Path(printed.strip()) == Path.home() / ".cache" / "marginrm" / "inductor"
