"""Weights packed for oneDNN: the same rewards, no more memory, and nothing to read or save by mistake."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from marginrm.errors import ModelError
from marginrm.forward.module import RewardModule
from marginrm.loading import load_for_scoring
from marginrm.reward_model import RewardModel
from marginrm.tuning import packed_weights
from support import zoo
from support.forward import groups_of
from support.models import DECODERS, ENCODERS, tiny_checkpoint

always = pytest.mark.usefixtures("packing_pays")


@pytest.fixture
def packing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's trial says."""
    monkeypatch.setattr(packed_weights, "_WORTH_IT", 0.0)


def loaded(path: Path, dtype: str, *, pack: bool) -> RewardModule:
    module, *_ = load_for_scoring(path, dtype=dtype, device="cpu", purpose="scoring" if pack else None)  # type: ignore[arg-type]
    assert ("weights packed" in module.forward_reason) == pack
    return module


@always
@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_rewards_stay(tmp_path: Path, family: str, dtype: str, tolerance: float) -> None:
    path = tiny_checkpoint(tmp_path, family)
    rewards = []
    for pack in (False, True):
        module = loaded(path, dtype, pack=pack)
        module.execution = replace(module.execution, attention="gathered")  # a trial of its own
        with torch.inference_mode():
            groups = groups_of(module.base.config.vocab_size, typed=family == "bert")
            rewards.append(module(module.collate(groups)))
    torch.testing.assert_close(rewards[1], rewards[0], atol=tolerance, rtol=tolerance)


@always
def test_layers_whose_weights_are_read_directly_are_left_alone(tmp_path: Path) -> None:
    sizes = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
    tok = zoo.tokenizer()
    zoo.write(tmp_path, zoo.model_of(zoo.SEQUENCE, zoo.config_of("Jamba", tok, use_mamba_kernels=False, **sizes)), tok)
    rewards = [
        RewardModel.from_module(*load_for_scoring(tmp_path, dtype="float32", device="cpu", purpose=purpose)[:2]).score(
            "Why does bread rise?", ["Yeast eats sugar and gives off gas.", "No."]
        )
        for purpose in (None, "scoring")
    ]
    assert rewards[1] == pytest.approx(rewards[0], rel=1e-5, abs=1e-5)
    module = loaded(tmp_path, "float32", pack=True)
    read = [part.dt_proj.weight.isnan().any() for part in module.modules() if hasattr(part, "dt_proj")]
    assert read
    assert not any(read)


@always
def test_the_plain_weights_are_given_up(tmp_path: Path) -> None:
    module = loaded(tiny_checkpoint(tmp_path, "llama"), "float32", pack=True)
    layers = [part for part in module.backbone.modules() if isinstance(part, nn.Linear)]
    assert layers
    for layer in layers:
        assert layer.weight.untyped_storage().nbytes() == 4, "one float32 value in memory"
        assert layer.weight.shape == (layer.out_features, layer.in_features)
        assert layer.weight.isnan().all()


LOAD_AND_SAY = """
import sys
import torch
from marginrm.encoding import EncodedResponse
from marginrm.tuning import packed_weights
from marginrm.loading import load_for_scoring

packed_weights._WORTH_IT = 0.0
module, *_ = load_for_scoring(sys.argv[1], dtype="float32", device="cpu", purpose=sys.argv[2] if sys.argv[2] == "scoring" else None)
with torch.inference_mode():  # plain weights come into memory as they are read
    module(module.collate([[EncodedResponse((5, 6))]]))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's memory as Linux tells it")
def test_memory_stays_what_it_was(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama", hidden_size=1024, intermediate_size=8192)
    weights = (path / "model.safetensors").stat().st_size // 1024
    assert weights > 200_000, "KiB: large enough to tell from what else a process holds"
    taken = {
        kind: int(subprocess.check_output([sys.executable, "-c", LOAD_AND_SAY, str(path), kind], text=True))
        for kind in ("plain", "scoring")
    }
    assert taken["scoring"] < taken["plain"] + 0.25 * weights


@always
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_they_can_be_compiled_around(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen3")
    plain = loaded(path, "float32", pack=False)
    compiled, *_ = load_for_scoring(path, dtype="float32", device="cpu", purpose="compiled_scoring")
    groups = groups_of(plain.base.config.vocab_size)
    with torch.inference_mode():
        found, expected = (module(module.collate(groups)) for module in (compiled, plain))
    assert "weights packed" in compiled.forward_reason
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@always
def test_saving_and_training_packed_weights_are_refused(tmp_path: Path) -> None:
    module = loaded(tiny_checkpoint(tmp_path, "qwen3"), "float32", pack=True)
    with pytest.raises(ModelError, match="loaded for training"):
        module.classifier.save_pretrained(tmp_path / "copy")
    with pytest.raises(ModelError, match="loaded for training"):
        module.state_dict()
    with pytest.raises(ModelError, match="loaded for training"):
        module(module.collate(groups_of(module.base.config.vocab_size)))


@always
def test_deterministic_models_keep_plain_weights_so_that_timing_decides_no_bit(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen3")
    assert "weights packed" in RewardModel.from_pretrained(path, dtype="float32", device="cpu").forward_reason
    fixed = RewardModel.from_pretrained(path, dtype="float32", device="cpu", deterministic=True)
    assert "weights packed" not in fixed.forward_reason


def test_where_the_trial_says_no_weights_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "_WORTH_IT", float("inf"))
    module = loaded(tiny_checkpoint(tmp_path, "llama"), "float32", pack=False)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert module.state_dict()
