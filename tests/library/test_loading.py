"""Checkpoints that need an option are refused by its name, others by their true name, and files from anywhere are found."""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
from pathlib import Path

import pytest
import torch

from marginrm.errors import ConfigError, HeadError, MarginRMError, ModelError
from marginrm.loading import find_checkpoint, resolve_device
from marginrm.manifest import HeadInfo, Manifest
from marginrm.process_rewards import FORMS
from marginrm.reading import ReadingOptions
from marginrm.reward_model import RewardModel
from support import zoo
from support.zoo import BOS_TEMPLATE, CAUSAL, EOS_TEMPLATE, SEQUENCE, TOKENS, config_of, model_of, tokenizer, write


def load(path: Path | str, **options: object) -> RewardModel:
    return RewardModel.from_pretrained(path, dtype="float32", reading=ReadingOptions(**options))  # type: ignore[arg-type]


def language_model(folder: Path, family: str = "Qwen2", **config: object) -> Path:
    tok = tokenizer()
    write(folder, model_of(CAUSAL, config_of(family, tok, num_labels=...)), tok, **config)
    return folder


def classifier(folder: Path, template: str = BOS_TEMPLATE, pad: str = "<pad>", **fields: object) -> Path:
    tok = tokenizer(template, bos=True, pad=pad)
    write(folder, model_of(SEQUENCE, config_of("Llama", tok, **fields)), tok)
    return folder


# Refused by name ------------------------------------------------------------------------------------------------------


def test_a_language_model_is_refused_with_the_options_that_read_logits(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=r"Qwen2ForCausalLM.*--reward-tokens.*--frame.*cannot be served"):
        load(language_model(tmp_path))


def test_a_sequence_to_sequence_model_is_refused_as_a_language_model(tmp_path: Path) -> None:
    tok = tokenizer(None)
    config = config_of("T5", tok, d_model=32, d_kv=8, d_ff=64, num_layers=1, decoder_start_token_id=0)
    write(tmp_path, model_of("AutoModelForSeq2SeqLM", config), tok)
    with pytest.raises(HeadError, match="T5ForConditionalGeneration, a sequence-to-sequence language model"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DebertaV2PairRM", "reads two responses"),
        ("LlamaForProcessRewardModel", "a process reward model.*--steps SEPARATOR"),
    ],
)
def test_other_kinds_of_reward_model_are_refused_by_name(tmp_path: Path, name: str, reason: str) -> None:
    zoo.change_config(classifier(tmp_path), architectures=[name])
    with pytest.raises(HeadError, match=rf"{name}.*{reason}"):
        load(tmp_path)


def test_a_token_classifier_of_two_classes_is_a_process_reward_model(tmp_path: Path) -> None:
    tok = tokenizer()
    write(tmp_path, model_of(TOKENS, config_of("Qwen2", tok, num_labels=2)), tok)
    reading = load(tmp_path).reading
    assert reading.steps == FORMS["trl-prm"]
    write(tmp_path, model_of(TOKENS, config_of("Qwen2", tok, num_labels=3)), tok)
    with pytest.raises(HeadError, match=r"3 classes for each token.*--steps SEPARATOR"):
        load(tmp_path)


def test_a_class_of_its_own_names_itself_and_the_option(tmp_path: Path) -> None:
    zoo.write_own_code(tmp_path, "GatedReward", {"rewards": (32, 3), "gate": (32, 3)})
    with pytest.raises(ModelError, match=r"GatedReward, whose forward pass is own code \(modeling_own.py\).*--trust"):
        load(tmp_path)


def test_a_model_type_that_transformers_does_not_have_is_named(tmp_path: Path) -> None:
    zoo.change_config(classifier(tmp_path), model_type="internlm2", architectures=["InternLM2ForRewardModel"])
    with pytest.raises(ModelError, match=r"InternLM2ForRewardModel of type 'internlm2'.*newer transformers"):
        load(tmp_path)
    zoo.change_config(tmp_path, auto_map={"AutoConfig": "configuration_internlm2.InternLM2Config"})
    with pytest.raises(ModelError, match=r"own code.*--trust-remote-code"):
        load(tmp_path)


def test_a_quantised_checkpoint_names_the_method_and_the_package(tmp_path: Path) -> None:
    zoo.change_config(classifier(tmp_path), quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(ModelError, match=r"quantised \(gptq\).*optimum"):
        load(tmp_path)


# Weights that have no place -------------------------------------------------------------------------------------------


def test_weights_of_a_head_that_is_not_understood_are_named(tmp_path: Path) -> None:
    language_model(tmp_path, architectures=["GatedReward"])
    zoo.change_weights(tmp_path, lambda old: old | {"rewards.weight": zoo.rows(3), "gate.weight": zoo.rows(3)})
    with pytest.raises(HeadError, match=r"no place.*gate.weight, rewards.weight"):
        load(tmp_path)


def test_lora_matrices_that_were_not_merged_are_an_error(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    classifier(tmp_path)
    zoo.change_weights(tmp_path, lambda old: old | {name: zoo.rows(4)})
    with pytest.raises(HeadError, match="LoRA matrices must be merged"):
        load(tmp_path)


def test_a_bias_that_transformers_drops_is_read_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classifier(tmp_path)
    zoo.change_weights(tmp_path, lambda old: old | {"score.bias": torch.tensor([3.0])})
    with caplog.at_level(logging.WARNING, "marginrm"):
        load(tmp_path)
    assert "LlamaForSequenceClassification drops score.bias without a word" in caplog.text


def test_harmless_weights_beside_the_head_are_left_out(tmp_path: Path) -> None:
    classifier(tmp_path)
    expected = load(tmp_path).score("Why?", ["Because."])
    others = {"lm_head.weight": zoo.rows(384), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    zoo.change_weights(tmp_path, lambda old: old | others)
    assert load(tmp_path).score("Why?", ["Because."]) == pytest.approx(expected)


# Options --------------------------------------------------------------------------------------------------------------


def test_a_head_of_several_rows_asks_for_their_weights(tmp_path: Path) -> None:
    classifier(tmp_path, num_labels=3)
    with pytest.raises(
        HeadError, match=r"3 values per sequence \(id2label.*--label-weights with 3 numbers, such as 1,0,0"
    ):
        load(tmp_path)
    with pytest.raises(HeadError, match="label_weights has 2 numbers"):
        load(tmp_path, label_weights=(1.0, 0.0))


def test_a_head_of_two_layers_asks_for_its_activation(tmp_path: Path) -> None:
    language_model(tmp_path)
    zoo.change_weights(tmp_path, lambda old: old | {"score.0.weight": zoo.rows(8), "score.2.weight": zoo.rows(1, 8)})
    with pytest.raises(HeadError, match=r"score.0, score.2.*--head-activation relu, gelu, silu or tanh"):
        load(tmp_path)


def test_a_word_of_several_tokens_is_not_a_vocabulary_entry(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward_tokens: 'certainly' is \d+ tokens.*such as id:N"):
        load(language_model(tmp_path), reward_tokens=("certainly",))


def test_an_unknown_frame_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qwen3-reranker, mxbai-rerank-v2, bge-reranker-gemma"):
        load(language_model(tmp_path), frame="qwen")


def test_a_frame_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "frame.jinja").write_text("Q: {{ query }}\nA: {{ document }}\nGood? ")
    model = load(language_model(tmp_path / "model"), frame=str(tmp_path / "frame.jinja"), reward_tokens=("id:5",))
    expected = model.encoder.tokenizer("Q: Why?\nA: Because.\nGood? ")["input_ids"]
    assert list(model.encoder.encode("Why?", "Because.").ids) == expected


def test_the_text_of_a_frame_is_never_cut_only_its_query(tmp_path: Path) -> None:
    model = load(language_model(tmp_path), frame="qwen3-reranker")
    query = "Why is the sea grey? " * 200
    text = model.encoder.tokenizer.decode(list(model.encoder.encode(query, "Grey.", "prompt_left").ids))
    assert text.startswith("<|im_start|>system\nJudge whether")
    assert text.endswith("<Document>: Grey.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos": "yes"}, "bos = 'yes' is not a valid value. Use one of: auto, on, off, double"),
        ({"reward_tokens": ("a", "b", "c")}, "give one token, or two"),
        ({"label_weights": (float("nan"),)}, "finite"),
    ],
)
def test_an_option_names_its_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReadingOptions(**options)  # type: ignore[arg-type]


def test_an_option_without_effect_is_refused(tmp_path: Path) -> None:
    tok = zoo.pair_tokenizer()
    write(tmp_path, model_of(SEQUENCE, config_of("Bert", tok, num_key_value_heads=...)), tok)
    with pytest.raises(ConfigError, match="bos: without effect"):
        load(tmp_path, bos="double")


def test_a_dtype_of_torch_is_taken_and_another_value_names_the_right_ones(tmp_path: Path) -> None:
    classifier(tmp_path)
    assert RewardModel.from_pretrained(tmp_path, dtype=torch.float32).info.dtype == "float32"
    with pytest.raises(ConfigError, match="auto, float32, bfloat16, float16"):
        RewardModel.from_pretrained(tmp_path, dtype="fp32")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"truncation = 'left' is not a valid value. Use one of: error, prompt_left"):
        RewardModel.from_pretrained(tmp_path, dtype="float32").score("a", ["b"], truncation="left")  # type: ignore[arg-type]


# The manifest records how a checkpoint is read -------------------------------------------------------------------------


def recorded(folder: Path, **options: object) -> RewardModel:
    """Loads a checkpoint, writes a manifest of it as `marginrm calibrate` does, and loads it again without options."""
    model = load(folder, **options)
    assert model.reading is not None
    Manifest(
        name="model",
        created="2026-01-01T00:00:00Z",
        base_model="somebody's",
        encoding=model.encoder.describe(),
        head=HeadInfo.of(model.reading.options),
    ).save(folder)
    again = load(folder)
    assert again.manifest is not None
    assert again.score("Why?", ["Because.", "No."]) == pytest.approx(model.score("Why?", ["Because.", "No."]))
    return again


def test_with_a_manifest_a_checkpoint_is_read_as_recorded(tmp_path: Path) -> None:
    recorded(classifier(tmp_path / "eos", EOS_TEMPLATE, pad="<|im_end|>"), bos="double")
    recorded(classifier(tmp_path / "rows", num_labels=2), label_weights=(-1.0, 1.0))
    recorded(language_model(tmp_path / "frame"), frame="qwen3-reranker")
    recorded(language_model(tmp_path / "tokens"), reward_tokens=("id:3",), frame="{{ query }} -> {{ document }}")


def test_an_option_that_contradicts_the_manifest_is_refused(tmp_path: Path) -> None:
    recorded(classifier(tmp_path), bos="double")
    load(tmp_path, bos="double")
    with pytest.raises(ConfigError, match=r"bos: reward_manifest.json records how"):
        load(tmp_path, bos="off")


# Files ----------------------------------------------------------------------------------------------------------------


def test_an_adapter_without_a_head_is_refused(tmp_path: Path) -> None:
    base = language_model(tmp_path / "base")
    model = zoo.transformers.AutoModelForCausalLM.from_pretrained(base)
    zoo.write_adapter(tmp_path / "lora", base, task="CAUSAL_LM", base_model=model, tok=tokenizer())
    with pytest.raises(HeadError, match="causal language model without a reward head"):
        load(tmp_path / "lora")


def test_an_adapter_whose_base_is_gone_is_told_so(tmp_path: Path) -> None:
    base = language_model(tmp_path / "base")
    model = zoo.transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    zoo.write_adapter(tmp_path / "lora", base, task="SEQ_CLS", base_model=model, tok=tokenizer())
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="LoRA adapter whose base model cannot be found"):
        load(tmp_path / "lora")


class _Runs:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


def test_a_pickle_that_holds_more_than_tensors_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"score.weight": torch.ones(1, 32), "more": _Runs()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"more": _Runs()}, protocol=2))
    with pytest.raises(ModelError, match=r"pytorch_model.bin"):
        load(tmp_path)
    assert "run" not in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_tokenizer_that_needs_a_package_names_it(tmp_path: Path) -> None:
    classifier(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ModelError, match="pip install sentencepiece"):
        load(tmp_path)


def test_a_name_on_the_hub_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--reward"
    classifier(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = load("somebody/reward")
    assert model.info.revision == f"hub:{commit}"
    assert model.info.base_model == "somebody/reward"
    with pytest.raises(ModelError, match="somebody/other"):
        load("somebody/other")


def test_a_folder_without_tokenizer_files_says_so(tmp_path: Path) -> None:
    (classifier(tmp_path) / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    tok = tokenizer()
    model_of(SEQUENCE, config_of("Qwen2", tok)).save_pretrained(tmp_path, max_shard_size="30KB")
    tok.save_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load(tmp_path)


@pytest.mark.parametrize(
    ("weight", "shape", "message"),
    [
        ("score.weight", (1, 16), r"score\.weight \[1, 16\] in place of \[1, 32\]"),
        ("model.embed_tokens.weight", (7, 32), r"embed_tokens\.weight \[7, 32\] in place of"),
    ],
)
def test_weights_of_another_shape_are_named(tmp_path: Path, weight: str, shape: tuple[int, ...], message: str) -> None:
    classifier(tmp_path)
    zoo.change_weights(tmp_path, lambda old: old | {weight: torch.zeros(shape)})
    with pytest.raises(HeadError, match=message):
        load(tmp_path)


def test_a_pickle_with_the_weights_inside_another_dictionary_is_named(tmp_path: Path) -> None:
    (classifier(tmp_path) / "model.safetensors").unlink()
    torch.save({"state_dict": {"score.weight": torch.zeros(1, 32)}, "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds state_dict, epoch, and no weights beside them"):
        load(tmp_path)


def test_a_token_without_an_embedding_is_named(tmp_path: Path) -> None:
    classifier(tmp_path)
    tok = tokenizer(BOS_TEMPLATE + "<|new|>", bos=True)
    tok.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tok.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the token \d+ \('<\|new\|>'\), and the model has \d+ embeddings"):
        load(tmp_path)


def test_own_code_keeps_the_dtype_that_it_was_saved_in(tmp_path: Path) -> None:
    zoo.write_own_code(tmp_path, "GatedReward", {"rewards": (32, 3), "gate": (32, 3)})
    model = RewardModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert model.info.dtype == "float32"


def test_missing_layers_are_not_taken_for_a_missing_head(tmp_path: Path) -> None:
    classifier(tmp_path)
    zoo.change_weights(tmp_path, lambda old: {name: one for name, one in old.items() if ".layers.1." not in name})
    with pytest.raises(HeadError, match=r"layers\.1\..*Does config\.json belong to these weights"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    (classifier(tmp_path) / "model.safetensors").unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load(tmp_path)


def test_an_adapter_beside_a_whole_model_is_refused(tmp_path: Path) -> None:
    (classifier(tmp_path) / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    with pytest.raises(ModelError, match=r"a whole model and an adapter.*delete the adapter's files"):
        load(tmp_path)


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    classifier(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load(tmp_path)


def test_several_chat_templates_without_a_default_are_named(tmp_path: Path) -> None:
    classifier(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": BOS_TEMPLATE} for name in ("rag", "tool_use")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"several chat templates \(rag, tool_use\), and none of them is called default"
    ):
        load(tmp_path)


def test_a_configuration_without_a_model_type_is_named(tmp_path: Path) -> None:
    zoo.change_config(classifier(tmp_path), model_type=...)
    with pytest.raises(ModelError, match="has no model_type"):
        load(tmp_path)


def test_what_transformers_cannot_build_is_an_error_of_marginrm(tmp_path: Path) -> None:
    zoo.change_config(classifier(tmp_path), pad_token_id=100_000)
    with pytest.raises(ModelError, match="Cannot load the model of"):
        load(tmp_path)


def test_a_model_with_scaled_positions_takes_what_they_reach(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = load(classifier(tmp_path / "dynamic", max_position_embeddings=100, rope_parameters=rope))
    assert model.encoder.max_length == 400
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    model = load(classifier(tmp_path / "yarn", max_position_embeddings=64, rope_parameters=yarn))
    assert model.encoder.max_length == 256


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    (classifier(tmp_path) / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json is not valid JSON"):
        find_checkpoint(tmp_path).config  # noqa: B018 - read for its error


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    reading = load(classifier(tmp_path, EOS_TEMPLATE, pad="<|im_end|>"), bos="double").reading
    assert reading is not None
    found = json.loads(json.dumps(reading.as_dict()))
    assert found["usage"] == "classifier"
    assert found["options"] == {"bos": "double"}
    assert found["leading_bos"] == 2
    assert "is EOS and padding at once" in found["notes"][0]
    assert issubclass(ConfigError, MarginRMError)


@pytest.mark.parametrize("name", ["cuda:99", "xpu:99"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"device = '{name}' is not available here: .*Use auto, or one of cpu"):
        resolve_device(name)
