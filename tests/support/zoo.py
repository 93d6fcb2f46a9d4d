"""Tiny random copies of the kinds of reward model that people publish, and what plain transformers makes of them.

Each builder writes a checkpoint as its trainer or author does and returns its documented use: a function from prompt
and response to a reward, one sequence at a time, in float32 with eager attention.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor

from support.models import CHATML_TEMPLATE, decoder_tokenizer, encoder_tokenizer

Reward = Callable[[Any, str], float]
Ids = Callable[[Any, Any, str], list[int]]

SEQUENCE = "AutoModelForSequenceClassification"
CAUSAL = "AutoModelForCausalLM"
TOKENS = "AutoModelForTokenClassification"

BOS_TEMPLATE = "{{ bos_token }}" + CHATML_TEMPLATE
EOS_TEMPLATE = (  # ends with EOS, as Zephyr's and Tulu's do
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}{% endfor %}"
)
DATED_TEMPLATE = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML_TEMPLATE
PAIR_TEMPLATE = (  # the roles of sentence-transformers' rerankers
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}Relevant? "
)

PROMPTS: Sequence[tuple[Any, Sequence[str]]] = (
    ("Why does bread rise?", ("Yeast eats sugar and gives off gas.", "No.")),
    ("Why is the sea grey? " * 9, ("I do not know. " * 5, "Ask somebody else, please.", "Grey.")),
    (
        [
            {"role": "user", "content": "How do I boil an egg?"},
            {"role": "assistant", "content": "Put it into boiling water."},
            {"role": "user", "content": "And then?"},
        ],
        ("Cool it.", "Red, yellow and blue."),
    ),
)


def tokenizer(
    template: str | None = CHATML_TEMPLATE, *, bos: bool = False, pad: str = "<pad>", eos: str = "<|im_end|>"
) -> Any:
    """Returns a byte-level tokenizer with a family's special tokens."""
    made = decoder_tokenizer(bos=bos, chat_template=template, max_length=1024)
    made.pad_token, made.eos_token = pad, eos
    return made


def roberta_tokenizer() -> Any:
    """Returns a tokenizer that joins a pair as RoBERTa does."""
    made = decoder_tokenizer(max_length=1024)
    ids = [(token, made.convert_tokens_to_ids(token)) for token in ("<s>", "<|endoftext|>")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", pair="<s> $A <|endoftext|> <|endoftext|> $B <|endoftext|>", special_tokens=ids
    )
    return made


def pair_tokenizer() -> Any:
    """Returns BERT's tokenizer."""
    return encoder_tokenizer(max_length=1024)


def config_of(kind: str, tok: Any, **fields: Any) -> Any:
    """Returns a tiny configuration of transformers' class `<kind>Config`; `...` leaves a field out."""
    usual: dict[str, Any] = {
        "vocab_size": len(tok),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "num_labels": 1,
        "pad_token_id": tok.pad_token_id,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
    }
    given = {name: value for name, value in (usual | fields).items() if value is not ...}
    return getattr(transformers, f"{kind}Config")(**given)


def model_of(auto: str, config: Any) -> Any:
    """Returns a random model whose head tells texts apart and whose norms and biases are not at their defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1 and weight.is_floating_point():
                    weight.add_(torch.randn_like(weight) * 0.1)
                if name.endswith(("score.weight", "classifier.weight", "out_proj.weight")):
                    weight.copy_(torch.randn_like(weight) * 0.5)
    return model


def write(folder: Path, model: Any, tok: Any, **config: Any) -> Any:
    """Writes a checkpoint, changes fields of its config.json (`...` removes one), and returns the model."""
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    change_config(folder, **config)
    return model


def change_config(folder: Path, **fields: Any) -> None:
    """Changes fields of config.json; `...` removes one."""
    path = folder / "config.json"
    known = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in known.items() if value is not ...}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Replaces the weights by what a function makes of them."""
    changed = change(load_file(folder / "model.safetensors"))
    save_file(
        {name: one.contiguous() for name, one in changed.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def as_bin(folder: Path) -> None:
    """Turns model.safetensors into pytorch_model.bin, as older trainers write it."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def join_marks_with_line_breaks(folder: Path) -> None:
    """Adds tokens of a mark and a line break to a tokenizer, as Qwen's has them."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    free = 1 + max([*data["model"]["vocab"].values(), *(one["id"] for one in data["added_tokens"])])
    for index, mark in enumerate("?."):
        data["model"]["vocab"][f"{mark}\u010a"] = free + index
        data["model"]["merges"].append([mark, "\u010a"])
    path.write_text(json.dumps(data))


def rows(count: int = 1, columns: int = 32, seed: int = 1) -> Tensor:
    """Returns the weight of a head."""
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def chat(tok: Any, prompt: Any, response: str) -> list[int]:
    """Tokenizes as cards do: `apply_chat_template` of the conversation."""
    return list(tok.apply_chat_template(turns(prompt, response), tokenize=True, return_dict=False))


def rendered(tok: Any, prompt: Any, response: str) -> str:
    """Renders a conversation."""
    return str(tok.apply_chat_template(turns(prompt, response), tokenize=False))


def turns(prompt: Any, response: str) -> list[dict[str, str]]:
    """Returns a conversation."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*messages, {"role": "assistant", "content": response}]


def plain(tok: Any, prompt: str, response: str) -> list[int]:
    """Tokenizes prompt and response as one text that ends in EOS, as TRL does without a chat template."""
    return list(tok(prompt + response + tok.eos_token)["input_ids"])


def output(model: Any, ids: Sequence[int], **more: Any) -> Any:
    """Runs a model on one sequence."""
    given = torch.tensor([list(ids)])
    with torch.no_grad():
        return model(input_ids=given, attention_mask=torch.ones_like(given), **more)


def by_classifier(folder: Path, ids: Ids = chat, auto: str = SEQUENCE, **load: Any) -> Reward:
    """Documented use of a sequence classifier: the saved folder, loaded by transformers' own class."""
    model = getattr(transformers, auto).from_pretrained(folder, attn_implementation="eager", **load).eval()
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    return lambda prompt, response: float(output(model, ids(tok, prompt, response)).logits.flatten()[0])


def by_pair(folder: Path, weights: Sequence[float] = (1.0,)) -> Reward:
    """Documented use of cross-encoders: `tokenizer(prompt, response)`."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    tok = transformers.AutoTokenizer.from_pretrained(folder)

    def reward(prompt: str, response: str) -> float:
        with torch.inference_mode():
            logits = model(**tok(prompt, response, return_tensors="pt")).logits[0]
        return float(logits @ torch.tensor(weights))

    return reward


def by_hidden(model: Any, tok: Any, head: Callable[[Tensor], Tensor], ids: Ids = chat) -> Reward:
    """Documented use of a value head: its value on the last hidden state of the last token."""

    def reward(prompt: Any, response: str) -> float:
        hidden = output(model, ids(tok, prompt, response), output_hidden_states=True).hidden_states[-1][0, -1]
        return float(head(hidden).detach().flatten()[0])

    return reward


def by_logits(model: Any, tok: Any, read: Callable[[Tensor], Tensor], ids: Ids = chat) -> Reward:
    """Documented use of a language model whose logits at the last token are the score."""
    return lambda prompt, response: float(read(output(model, ids(tok, prompt, response)).logits[0, -1]))


def by_forward(model: Any, tok: Any, ids: Ids = chat) -> Reward:
    """Documented use of a class of a checkpoint's own: its forward pass."""

    def reward(prompt: Any, response: str) -> float:
        found = output(model, ids(tok, prompt, response))
        values = getattr(found, "logits", found[0] if isinstance(found, tuple) else found)
        return float(values.flatten()[0])

    return reward


OWN_CODE = '''
import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class OwnReward(LlamaPreTrainedModel):
    """Layers and where they are read come from the configuration."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        for name, (size, count) in config.own_layers.items():
            self.add_module(name, nn.Linear(size, count))
        self.post_init()

    def states(self, input_ids, attention_mask):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        return hidden, hidden[torch.arange(len(hidden)), last]


class GatedReward(OwnReward):
    """Weighs several rewards by a gate that reads the last user turn's end, and fails without one."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden, last = self.states(input_ids, attention_mask)
        ends = (input_ids == self.config.turn_token).long().cumsum(1).argmax(1)
        if not (input_ids == self.config.turn_token).any(1).all():
            raise ValueError("There is no turn.")
        gate = self.gate(hidden[torch.arange(len(hidden)), ends]).softmax(-1)
        return SequenceClassifierOutput(logits=(self.rewards(last) * gate).sum(-1, keepdim=True))


class MeanForSequenceClassification(OwnReward):
    """Has a `score`, and reads the mean of all tokens with it."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden, _ = self.states(input_ids, attention_mask)
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return SequenceClassifierOutput(logits=self.score((hidden * mask).sum(1) / mask.sum(1)))


class TwoForSequenceClassification(OwnReward):
    """Gives two classes."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return SequenceClassifierOutput(logits=self.score(self.states(input_ids, attention_mask)[1]))


class TupleReward(OwnReward):
    """Gives a tuple, and is loaded by AutoModel."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return (self.v_head(self.states(input_ids, attention_mask)[1]),)
'''


def write_own_code(
    folder: Path, name: str, layers: Mapping[str, tuple[int, int]], *, auto: str = SEQUENCE
) -> tuple[Any, Any]:
    """Writes a checkpoint whose class lies beside its weights; returns the model and its tokenizer."""
    tok = tokenizer(BOS_TEMPLATE, bos=True)
    config = config_of("Llama", tok, own_layers=dict(layers), turn_token=tok.convert_tokens_to_ids("<|im_end|>"))
    space: dict[str, Any] = {}
    exec(OWN_CODE, space)
    torch.manual_seed(0)
    model = space[name](config).eval()
    write(folder, model, tok, architectures=[name], auto_map={auto: f"modeling_own.{name}"})
    (folder / "modeling_own.py").write_text(OWN_CODE)
    return model, tok


def write_adapter(
    folder: Path, base: Path, *, base_model: Any, tok: Any, task: str | None = None, **options: Any
) -> Any:
    """Writes a LoRA adapter alone, trained on the folder `base`, and returns the model with it."""
    from peft import LoraConfig, TaskType, get_peft_model

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    wrapped = get_peft_model(
        base_model,
        LoraConfig(
            task_type=getattr(TaskType, task) if task else None,
            r=4,
            target_modules=["q_proj", "v_proj"],
            **options,
        ),
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name or "score" in name:
                weight.copy_(torch.randn_like(weight) * 0.3)
    wrapped.save_pretrained(folder)
    tok.save_pretrained(folder)
    assert not (folder / "config.json").exists()
    assert base.is_dir()
    return wrapped.eval()


def copied(source: Path, target: Path) -> Path:
    """Copies a checkpoint."""
    return Path(shutil.copytree(source, target))
