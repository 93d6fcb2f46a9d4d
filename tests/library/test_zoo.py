"""Every kind of reward model that people publish is read as its author meant: tiny copies against plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from marginrm.reading import ReadingOptions
from marginrm.reward_model import RewardModel
from support import zoo
from support.zoo import (
    BOS_TEMPLATE,
    CAUSAL,
    CHATML_TEMPLATE,
    DATED_TEMPLATE,
    EOS_TEMPLATE,
    PAIR_TEMPLATE,
    SEQUENCE,
    TOKENS,
    Reward,
    config_of,
    model_of,
    tokenizer,
    write,
)


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: its builder, the options that it needs, and whether it takes conversations."""

    build: Callable[[Path], Reward]
    options: ReadingOptions = field(default_factory=ReadingOptions)
    chats: bool = True
    path: str = "packed"


KINDS: dict[str, Kind] = {}


def kind(*, chats: bool = True, path: str = "packed", **options: object) -> Callable[..., Callable[[Path], Reward]]:
    def register(build: Callable[[Path], Reward]) -> Callable[[Path], Reward]:
        KINDS[build.__name__] = Kind(build, ReadingOptions(**options), chats, path)  # type: ignore[arg-type]
        return build

    return register


# Decoders of transformers ---------------------------------------------------------------------------------------------


def classifier(folder: Path, family: str, template: str | None = CHATML_TEMPLATE, **options: object) -> Reward:
    """Writes a plain classifier of a family and returns its documented use."""
    names = ("bos", "pad", "eos")
    tok = tokenizer(template, **{name: options.pop(name) for name in names if name in options})  # type: ignore[arg-type]
    write(folder, model_of(SEQUENCE, config_of(family, tok, **options)), tok)
    return zoo.by_classifier(folder, ids=zoo.chat if template else zoo.plain)


@kind()
def llama_with_bos(folder: Path) -> Reward:
    return classifier(folder, "Llama", BOS_TEMPLATE, bos=True)


@kind()
def template_without_bos_on_a_tokenizer_that_adds_it(folder: Path) -> Reward:
    return classifier(folder, "Mistral", CHATML_TEMPLATE, bos=True, sliding_window=None)


@kind()
def padding_token_is_eos(folder: Path) -> Reward:
    return classifier(folder, "Llama", EOS_TEMPLATE, pad="<|im_end|>")


@kind(chats=False)
def padding_token_is_eos_without_a_template(folder: Path) -> Reward:
    return classifier(folder, "Qwen2", None, pad="<|im_end|>")


@kind()
def no_padding_token(folder: Path) -> Reward:
    return classifier(folder, "Llama", BOS_TEMPLATE, bos=True, pad_token_id=None)


@kind()
def padding_token_of_minus_one(folder: Path) -> Reward:
    return classifier(folder, "Llama", CHATML_TEMPLATE, pad_token_id=-1)


@kind(chats=False)
def base_model_with_plain_text(folder: Path) -> Reward:
    return classifier(folder, "GPTNeoX", None, eos="<|endoftext|>", num_key_value_heads=...)


@kind()
def soft_capped_attention(folder: Path) -> Reward:
    sizes = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32, "attn_logit_softcapping": 2.0}
    return classifier(folder, "Gemma2", BOS_TEMPLATE, bos=True, **sizes)


@kind()
def attention_sinks(folder: Path) -> Reward:
    sizes = {"head_dim": 8, "sliding_window": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    return classifier(folder, "GptOss", layer_types=["sliding_attention", "full_attention"], **sizes)


@kind()
def mixture_of_experts(folder: Path) -> Reward:
    return classifier(folder, "Mixtral", num_local_experts=4, num_experts_per_tok=2)


@kind()
def rope_that_depends_on_the_length(folder: Path) -> Reward:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    return classifier(folder, "Phi3", original_max_position_embeddings=64, rope_parameters=rope)


@kind()
def rope_that_scales_with_the_length(folder: Path) -> Reward:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
    classifier(folder, "Llama", BOS_TEMPLATE, bos=True, max_position_embeddings=96, rope_parameters=rope)

    def reward(prompt: zoo.Any, response: str) -> float:  # transformers' module remembers the longest text so far
        return zoo.by_classifier(folder)(prompt, response)

    return reward


@kind()
def mixture_of_experts_with_a_value_head(folder: Path) -> Reward:
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    model, tok = value_head(folder, "Qwen3Moe", **more)
    zoo.change_weights(folder, lambda old: old | {"v_head.weight": zoo.rows()})
    return zoo.by_hidden(model, tok, lambda hidden: zoo.rows() @ hidden)


@kind(path="padded")
def linear_attention(folder: Path) -> Reward:
    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    layers = ["linear_attention", "full_attention"]
    return classifier(folder, "Qwen3_5Text", head_dim=16, linear_num_value_heads=4, layer_types=layers, **sizes)


@kind()
def text_and_vision(folder: Path) -> Reward:
    tok = tokenizer(BOS_TEMPLATE, bos=True)
    text = config_of("Gemma3Text", tok, head_dim=8, query_pre_attn_scalar=8, sliding_window=32).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = zoo.transformers.Gemma3Config(
        text_config=text | {"layer_types": ["sliding_attention", "full_attention"]},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        num_labels=1,
    )
    write(folder, model_of(SEQUENCE, config), tok)
    return zoo.by_classifier(folder)


@kind()
def decoder_whose_head_has_another_name(folder: Path) -> Reward:
    fields = {"cls_token_id": 0, "sep_token_id": 0, "local_attention": 32, "num_key_value_heads": ...}
    return classifier(folder, "ModernBertDecoder", BOS_TEMPLATE, bos=True, **fields)


@kind(chats=False, path="padded")
def alibi(folder: Path) -> Reward:
    tok = tokenizer(None)
    config = config_of(
        "Bloom", tok, n_layer=2, n_head=4, **dict.fromkeys(("num_key_value_heads", "intermediate_size"), ...)
    )
    write(folder, model_of(SEQUENCE, config), tok)
    return zoo.by_classifier(folder, ids=zoo.plain)


@kind(chats=False)
def hidden_states_that_are_projected(folder: Path) -> Reward:
    more = {"ffn_dim": 64, "word_embed_proj_dim": 16, "num_key_value_heads": ..., "intermediate_size": ...}
    return classifier(folder, "OPT", None, **more)


@kind()
def half_precision_weights(folder: Path) -> Reward:
    tok = tokenizer()
    write(folder, model_of(SEQUENCE, config_of("Qwen3", tok, head_dim=16)).to(torch.bfloat16), tok)
    return zoo.by_classifier(folder, dtype=torch.float32)


@kind(bos="double")
def card_that_doubles_bos(folder: Path) -> Reward:
    classifier(folder, "Llama", BOS_TEMPLATE, bos=True)
    return zoo.by_classifier(
        folder, lambda tok, prompt, response: tok(zoo.rendered(tok, prompt, response))["input_ids"]
    )


@kind(eos="on")
def trained_on_eos_in_place_of_the_line_break(folder: Path) -> Reward:
    classifier(folder, "Qwen2", CHATML_TEMPLATE)
    return zoo.by_classifier(folder, lambda tok, *texts: zoo.chat(tok, *texts)[:-1])


@kind()
def todays_date(folder: Path) -> Reward:
    classifier(folder, "Llama", DATED_TEMPLATE)
    fixed = DATED_TEMPLATE.replace("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024")

    def ids(tok: zoo.Any, prompt: zoo.Any, response: str) -> list[int]:
        tok.chat_template = fixed
        return zoo.chat(tok, prompt, response)

    return zoo.by_classifier(folder, ids)


# Encoders -------------------------------------------------------------------------------------------------------------


def cross_encoder(folder: Path, family: str, tok: zoo.Any, **options: object) -> Reward:
    fields = {"num_key_value_heads": ..., **options}
    write(folder, model_of(SEQUENCE, config_of(family, tok, **fields)), tok)
    return zoo.by_pair(folder)


@kind(chats=False)
def bert(folder: Path) -> Reward:
    return cross_encoder(folder, "Bert", zoo.pair_tokenizer())


@kind(chats=False)
def roberta_with_its_position_offset(folder: Path) -> Reward:
    return cross_encoder(folder, "XLMRoberta", zoo.roberta_tokenizer(), max_position_embeddings=1026, type_vocab_size=1)


@kind(chats=False, path="padded")
def disentangled_attention(folder: Path) -> Reward:
    more = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
    return cross_encoder(folder, "DebertaV2", zoo.pair_tokenizer(), position_biased_input=False, **more)


@kind(chats=False)
def modernbert_with_mean_pooling(folder: Path) -> Reward:
    tok = zoo.pair_tokenizer()
    more = {"cls_token_id": tok.cls_token_id, "sep_token_id": tok.sep_token_id, "classifier_pooling": "mean"}
    return cross_encoder(folder, "ModernBert", tok, local_attention=32, **more)


@kind(chats=False, path="padded", label_weights=(-1.0, 1.0))
def encoder_of_two_classes(folder: Path) -> Reward:
    cross_encoder(folder, "DistilBert", zoo.pair_tokenizer(), num_labels=2)
    return zoo.by_pair(folder, (-1.0, 1.0))


@kind(frame="nemotron-rerank")
def encoder_that_reads_one_text(folder: Path) -> Reward:
    tok = zoo.pair_tokenizer()
    cross_encoder(folder, "Bert", tok)
    model = AutoModelForSequenceClassification.from_pretrained(folder)

    def ids(tok: zoo.Any, prompt: zoo.Any, response: str) -> list[int]:
        query = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return list(tok(f"question:{query} \n \n passage:{response}")["input_ids"])

    return zoo.by_forward(model, tok, ids)


# Heads and what trainers write ----------------------------------------------------------------------------------------


@kind()
def openrlhf(folder: Path) -> Reward:
    tok = tokenizer(EOS_TEMPLATE, pad="<|im_end|>")
    model = write(
        folder, model_of(SEQUENCE, config_of("Qwen2", tok)), tok, architectures=["RewardModel"], id2label=..., label2id=...,
        value_head_prefix="score", normalize_reward=False, mean=0.5, std=2.0,
    )  # fmt: skip
    return zoo.by_hidden(model.model, tok, model.score)


@kind()
def openrlhf_with_an_older_head_and_normalisation(folder: Path) -> Reward:
    tok = tokenizer()
    model = write(
        folder, model_of(SEQUENCE, config_of("Llama", tok)), tok, architectures=["RewardModel"], id2label=..., label2id=...,
        value_head_prefix="value_head", normalize_reward=True, mean=0.5, std=2.0,
    )  # fmt: skip
    zoo.change_weights(folder, lambda old: {name.replace("score", "value_head"): one for name, one in old.items()})
    return zoo.by_hidden(model.model, tok, lambda hidden: (model.score(hidden) - 0.5) / 2.0)


def value_head(folder: Path, family: str = "Qwen2", **fields: object) -> tuple[zoo.Any, zoo.Any]:
    tok = tokenizer()
    model = model_of(CAUSAL, config_of(family, tok, num_labels=..., **fields))
    return write(folder, model, tok), tok


@kind()
def trl_value_head(folder: Path) -> Reward:
    model, tok = value_head(folder)
    head = {"v_head.summary.weight": zoo.rows(), "v_head.summary.bias": torch.tensor([0.3])}
    zoo.change_weights(folder, lambda old: old | head)
    return zoo.by_hidden(model, tok, lambda hidden: zoo.rows() @ hidden + 0.3)


@kind()
def llama_factory_value_head_file(folder: Path) -> Reward:
    model, tok = value_head(folder)
    head = {"v_head.summary.weight": zoo.rows(), "v_head.summary.bias": torch.tensor([-1.0])}
    save_file(head, folder / "value_head.safetensors")
    return zoo.by_hidden(model, tok, lambda hidden: zoo.rows() @ hidden - 1.0)


@kind(chats=False)
def deepspeed_chat(folder: Path) -> Reward:
    tok = tokenizer(None)
    fields = {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_key_value_heads": ..., "intermediate_size": ...}
    model = write(folder, model_of(CAUSAL, config_of("OPT", tok, num_labels=..., **fields)), tok)

    def renamed(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        body = {name.replace("model.", "rwtransformer.", 1): one for name, one in old.items() if "lm_head" not in name}
        return body | {"v_head.weight": zoo.rows()}

    zoo.change_weights(folder, renamed)
    zoo.as_bin(folder)
    return zoo.by_hidden(model, tok, lambda hidden: zoo.rows() @ hidden, zoo.plain)


@kind()
def backbone_without_a_classifier_in_transformers(folder: Path) -> Reward:
    model, tok = value_head(folder, "Granite")
    zoo.change_weights(folder, lambda old: old | {"reward_head.weight": zoo.rows()})
    return zoo.by_hidden(model, tok, lambda hidden: zoo.rows() @ hidden)


@kind()
def verl_token_classifier(folder: Path) -> Reward:
    tok = tokenizer(EOS_TEMPLATE, pad="<|im_end|>")
    write(folder, model_of(TOKENS, config_of("Qwen2", tok)), tok)
    model = zoo.transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    return zoo.by_logits(model, tok, lambda last: last)


@kind()
def head_of_two_layers_in_a_known_class(folder: Path) -> Reward:
    model, tok = value_head(folder, "Llama")
    first, second, bias = zoo.rows(32), zoo.rows(seed=2), torch.ones(32)
    head = {"score.0.weight": first, "score.0.bias": bias, "score.2.weight": second, "score.2.bias": torch.zeros(1)}
    zoo.change_weights(folder, lambda old: {n: w for n, w in old.items() if "lm_head" not in n} | head)
    zoo.change_config(folder, architectures=["INFORMForSequenceClassification"])
    return zoo.by_hidden(model, tok, lambda hidden: second @ torch.relu(first @ hidden + bias))


@kind(head_activation="silu")
def head_of_two_layers_whose_activation_is_said(folder: Path) -> Reward:
    model, tok = value_head(folder)
    first, second = zoo.rows(16), zoo.rows(1, 16, seed=2)
    zoo.change_weights(folder, lambda old: old | {"reward.fc1.weight": first, "reward.fc2.weight": second})
    return zoo.by_hidden(model, tok, lambda hidden: second @ torch.nn.functional.silu(first @ hidden))


@kind(chats=False)
def open_assistant(folder: Path) -> Reward:
    tok = tokenizer(None)
    config = config_of("GPTNeoX", tok, num_labels=..., num_key_value_heads=...)
    model = write(folder, model_of("AutoModel", config), tok, pooling="last")
    head = {"out_proj.weight": zoo.rows(), "out_proj.bias": torch.tensor([0.3])}
    zoo.change_weights(folder, lambda old: {f"gpt_neox.{name}": one for name, one in old.items()} | head)
    zoo.change_config(folder, architectures=["GPTNeoXRewardModel"], model_type="gpt_neox_reward_model")
    return zoo.by_hidden(model, tok, lambda hidden: zoo.rows() @ hidden + 0.3, zoo.plain)


@kind()
def regression_head(folder: Path) -> Reward:
    model, tok = value_head(folder, "Llama")
    zoo.change_weights(folder, lambda old: old | {"regression_head.weight": zoo.rows()})
    zoo.change_config(folder, architectures=["LlamaRewardModel"])
    return zoo.by_hidden(model, tok, lambda hidden: zoo.rows() @ hidden)


@kind()
def reward_token_at_the_end(folder: Path) -> Reward:
    model, tok = value_head(folder, "Llama")
    reward = tok.convert_tokens_to_ids("<|endoftext|>")
    zoo.change_weights(folder, lambda old: old | {"v_head.weight": zoo.rows()})
    zoo.change_config(folder, architectures=["InternLM2ForRewardModel"], reward_token_id=reward)
    return zoo.by_hidden(model, tok, lambda hidden: zoo.rows() @ hidden, lambda *texts: [*zoo.chat(*texts), reward])


@kind()
def score_with_a_bias(folder: Path) -> Reward:
    tok = tokenizer()
    model = write(folder, model_of(SEQUENCE, config_of("Llama", tok)), tok)
    zoo.change_weights(folder, lambda old: old | {"score.bias": torch.tensor([3.0])})
    return zoo.by_hidden(model.model, tok, lambda hidden: model.score(hidden) + 3.0)


@kind()
def number_of_labels_not_in_the_configuration(folder: Path) -> Reward:
    tok = tokenizer()
    write(folder, model_of(SEQUENCE, config_of("Qwen2", tok)), tok, id2label=..., label2id=...)
    return zoo.by_classifier(folder, num_labels=1)


@kind(label_weights=(0.7, 0.0, 0.3))
def several_attributes(folder: Path) -> Reward:
    tok = tokenizer()
    model = write(folder, model_of(SEQUENCE, config_of("Qwen2", tok, num_labels=3)), tok)
    factors = torch.tensor([0.7, 0.0, 0.3])
    return zoo.by_hidden(model.model, tok, lambda hidden: factors @ model.score(hidden))


# Adapters -------------------------------------------------------------------------------------------------------------


@kind()
def adapter_with_its_head(folder: Path) -> Reward:
    base = folder / "base"
    value_head(base)
    tok = tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    wrapped = zoo.write_adapter(folder, base, task="SEQ_CLS", base_model=model, tok=tok)
    wrapped.config.pad_token_id = tok.pad_token_id
    return zoo.by_forward(wrapped, tok)


@kind()
def adapter_on_a_language_model_with_a_value_head_file(folder: Path) -> Reward:
    base = folder / "base"
    _, tok = value_head(base)
    model = zoo.transformers.AutoModelForCausalLM.from_pretrained(base)
    wrapped = zoo.write_adapter(folder, base, task="CAUSAL_LM", base_model=model, tok=tok)
    save_file({"v_head.summary.weight": zoo.rows()}, folder / "value_head.safetensors")
    return zoo.by_hidden(wrapped, tok, lambda hidden: zoo.rows() @ hidden)


@kind()
def adapter_of_trl_with_its_value_head_in_a_bin_file(folder: Path) -> Reward:
    base = folder / "base"
    _, tok = value_head(base)
    model = zoo.transformers.AutoModelForCausalLM.from_pretrained(base)
    wrapped = zoo.write_adapter(folder, base, task="CAUSAL_LM", base_model=model, tok=tok)
    torch.save(
        {"v_head.summary.weight": zoo.rows(), "v_head.summary.bias": torch.zeros(1)}, folder / "pytorch_model.bin"
    )
    return zoo.by_hidden(wrapped, tok, lambda hidden: zoo.rows() @ hidden)


@kind()
def adapter_with_its_head_and_embeddings(folder: Path) -> Reward:
    base = folder / "base"
    value_head(base)
    tok = tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = tok.pad_token_id
    wrapped = zoo.write_adapter(folder, base, base_model=model, tok=tok, modules_to_save=["score", "embed_tokens"])
    wrapped.save_pretrained(folder, save_embedding_layers=True)  # as after resize_token_embeddings
    return zoo.by_forward(wrapped, tok)


@kind(reward_tokens=("id:7",))
def adapter_on_a_language_model_whose_logit_is_read(folder: Path) -> Reward:
    base = folder / "base"
    _, tok = value_head(base)
    model = zoo.transformers.AutoModelForCausalLM.from_pretrained(base)
    wrapped = zoo.write_adapter(folder, base, task="CAUSAL_LM", base_model=model, tok=tok)
    return zoo.by_logits(wrapped, tok, lambda last: last[7])


# Logits of language models --------------------------------------------------------------------------------------------


@kind(reward_tokens=("id:0",))
def logit_of_one_token(folder: Path) -> Reward:
    model, tok = value_head(folder, "Llama")
    return zoo.by_logits(model, tok, lambda last: last[0])


@kind(reward_tokens=("id:7", "id:9"))
def log_odds_of_capped_logits(folder: Path) -> Reward:
    model, tok = value_head(folder, "Gemma2", head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
    return zoo.by_logits(model, tok, lambda last: last[7] - last[9])


@kind(reward_tokens=("id:7", "id:9"))
def log_odds_of_scaled_logits(folder: Path) -> Reward:
    model, tok = value_head(folder, "Cohere", logit_scale=0.25)
    return zoo.by_logits(model, tok, lambda last: last[7] - last[9])


@kind(frame="qwen3-reranker")
def reranker_with_a_known_frame(folder: Path) -> Reward:
    model, tok = value_head(folder, "Qwen3", head_dim=16, tie_word_embeddings=True)
    yes, no = (tok(word)["input_ids"][0] for word in ("yes", "no"))
    before = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web '
        "search query, retrieve relevant passages that answer the query\n"
    )
    after = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

    def ids(tok: zoo.Any, prompt: zoo.Any, response: str) -> list[int]:
        query = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return list(tok(f"{before}<Query>: {query}\n<Document>: {response}{after}")["input_ids"])

    return zoo.by_logits(model, tok, lambda last: last[yes] - last[no], ids)


@kind(frame="mxbai-rerank-v2")
def reranker_whose_parts_are_tokenized_apart(folder: Path) -> Reward:
    tok = tokenizer()
    model = model_of(CAUSAL, config_of("Qwen2", tok, num_labels=..., vocab_size=len(tok) + 2))
    write(folder, model, tok)
    zoo.join_marks_with_line_breaks(folder)
    tok = zoo.transformers.AutoTokenizer.from_pretrained(folder)
    task = (
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
    )
    system = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"

    def ids(tok: zoo.Any, prompt: zoo.Any, response: str) -> list[int]:
        query = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        parts = [f"{system}<|im_start|>user\n", f"query: {query}", "\n", f"document: {response}", "\n", task]
        return [one for part in [*parts, "<|im_end|>\n<|im_start|>assistant\n"] for one in tok(part)["input_ids"]]

    first, second = (tok(word)["input_ids"][0] for word in "10")
    assert len(tok("?\n")["input_ids"]) == 1
    return zoo.by_logits(model, tok, lambda last: last[first] - last[second], ids)


@kind()
def sentence_transformers_logit_score(folder: Path) -> Reward:
    tok = tokenizer(PAIR_TEMPLATE)
    model = write(folder, model_of(CAUSAL, config_of("Qwen3", tok, num_labels=..., head_dim=16)), tok)
    modules = [
        ("", "sentence_transformers.base.modules.Transformer"),
        ("1_LogitScore", "cross_encoder.modules.LogitScore"),
    ]
    (folder / "modules.json").write_text(json.dumps([{"path": path, "type": name} for path, name in modules]))
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text('{"true_token_id": 40, "false_token_id": 41}')

    def ids(tok: zoo.Any, prompt: zoo.Any, response: str) -> list[int]:
        query = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        pair = [{"role": "query", "content": query}, {"role": "document", "content": response}]
        return list(tok.apply_chat_template(pair, tokenize=True, return_dict=False))

    return zoo.by_logits(model, tok, lambda last: last[40] - last[41], ids)


# Own code -------------------------------------------------------------------------------------------------------------


@kind(trust_remote_code=True, path="padded")
def own_class_with_a_gate(folder: Path) -> Reward:
    return zoo.by_forward(*zoo.write_own_code(folder, "GatedReward", {"rewards": (32, 3), "gate": (32, 3)}))


@kind(trust_remote_code=True, path="padded")
def own_class_that_reads_the_mean_of_all_tokens(folder: Path) -> Reward:
    return zoo.by_forward(*zoo.write_own_code(folder, "MeanForSequenceClassification", {"score": (32, 1)}))


@kind(trust_remote_code=True)
def own_class_that_gives_a_tuple(folder: Path) -> Reward:
    return zoo.by_forward(*zoo.write_own_code(folder, "TupleReward", {"v_head": (32, 1)}, auto="AutoModel"))


@kind(trust_remote_code=True, path="padded", label_weights=(-1.0, 1.0))
def own_class_of_two_classes(folder: Path) -> Reward:
    model, tok = zoo.write_own_code(folder, "TwoForSequenceClassification", {"score": (32, 2)})
    return lambda prompt, response: float(
        zoo.output(model, zoo.chat(tok, prompt, response)).logits[0] @ torch.tensor([-1.0, 1.0])
    )


# Files ----------------------------------------------------------------------------------------------------------------


@kind()
def several_weight_files(folder: Path) -> Reward:
    tok = tokenizer()
    model_of(SEQUENCE, config_of("Qwen2", tok)).save_pretrained(folder, max_shard_size="30KB")
    tok.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return zoo.by_classifier(folder)


@kind()
def pickled_weights(folder: Path) -> Reward:
    reward = classifier(folder, "Llama", BOS_TEMPLATE, bos=True)
    zoo.as_bin(folder)
    return reward


@pytest.mark.parametrize("name", KINDS)
def test_rewards_are_those_of_the_documented_use(name: str, tmp_path: Path) -> None:
    one = KINDS[name]
    reward = one.build(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, dtype="float32", reading=one.options)
    prompts = [(prompt, responses) for prompt, responses in zoo.PROMPTS if one.chats or isinstance(prompt, str)]
    groups = [model.encoder.encode_group(prompt, responses) for prompt, responses in prompts]
    found = model.score_encoded(groups)  # type: ignore[arg-type]
    expected = [[reward(prompt, response) for response in responses] for prompt, responses in prompts]
    for rewards, wanted in zip(found, expected, strict=True):
        assert rewards == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert model.forward_path == one.path, model.forward_reason


@pytest.mark.parametrize(
    "name",
    [
        "trl_value_head", "several_attributes", "encoder_of_two_classes", "logit_of_one_token", "log_odds_of_capped_logits",
        "openrlhf_with_an_older_head_and_normalisation", "regression_head", "verl_token_classifier",
    ],
)  # fmt: skip
def test_heads_in_float32_take_hidden_states_in_bfloat16(name: str, tmp_path: Path) -> None:
    one = KINDS[name]
    reward = one.build(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, dtype="bfloat16", reading=one.options)
    prompt, responses = zoo.PROMPTS[0]
    expected = [reward(prompt, response) for response in responses]
    assert model.score(prompt, list(responses)) == pytest.approx(expected, rel=0.1, abs=0.2)
