"""The text that rerankers built on language models read around a query and a document.

Each known frame is the text of a public model's card, with the vocabulary entries whose logits are its score.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from marginrm.errors import ConfigError, InvalidTextError

# Between parts that an author's code tokenizes apart: without it, "?" and a line break may become one token.
SEAM = "\ue001"
_BREAK = f"{SEAM}\n{SEAM}"
_RETRIEVAL = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True, slots=True)
class Frame:
    """A reranker's text.

    Attributes:
        name: As `--frame` names it.
        template: Jinja text with `query`, `document`, `instruction` and `messages`; None for the tokenizer's own chat
            template with the roles `query` and `document`, as sentence-transformers renders it. `SEAM` stands between
            parts that are tokenized apart.
        reward_tokens: Vocabulary entries whose logits are the score: the first minus the second, if there are two.
        instruction: Used where the template asks for one.
    """

    name: str
    template: str | None
    reward_tokens: tuple[str, ...] | None = None
    instruction: str = ""

    def render(self, messages: list[dict[str, Any]], document: str) -> str:
        """Returns the text for one document.

        Args:
            messages: The prompt; its last message is the query.
            document: The response.

        Raises:
            InvalidTextError: The template refuses these messages.
        """
        assert self.template is not None  # without one, the tokenizer renders
        try:
            return (
                ImmutableSandboxedEnvironment(keep_trailing_newline=True)
                .from_string(self.template)
                .render(
                    messages=messages, query=messages[-1]["content"], document=document, instruction=self.instruction
                )
            )
        except TemplateError as error:
            raise InvalidTextError(f"The frame {self.name} refuses these texts: {str(error)[:200]}") from error


QUERY_DOCUMENT = Frame("query-document", None)

FRAMES = {
    frame.name: frame
    for frame in (
        # Qwen/Qwen3-Reranker-0.6B, 4B, 8B: model card.
        Frame(
            "qwen3-reranker",
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            "<Instruct>: {{ instruction }}\n<Query>: {{ query }}\n<Document>: {{ document }}<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            ("yes", "no"),
            _RETRIEVAL,
        ),
        # mixedbread-ai/mxbai-rerank-base-v2, large-v2: mxbai_rerank_v2.py.
        Frame(
            "mxbai-rerank-v2",
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nquery: {{ query }}" + _BREAK + "document: {{ document }}" + _BREAK + "You are a search "
            "relevance expert who evaluates how well documents match search queries. For each query-document pair, carefully analyze the "
            "semantic relationship between them, then provide your binary relevance judgment (0 for not relevant, 1 "
            "for relevant).\nRelevance:<|im_end|>\n<|im_start|>assistant\n",
            ("1", "0"),
        ),
        # BAAI/bge-reranker-v2-gemma: model card.
        Frame(
            "bge-reranker-gemma",
            "A: {{ query }}" + _BREAK + "B: {{ document }}" + _BREAK + "Given a query A and a passage B, determine "
            "whether the passage contains an answer to the query by providing a prediction of either 'Yes' or 'No'.",
            ("Yes",),
        ),
        # nvidia/llama-nemotron-rerank-1b-v2, llama-3.2-nv-rerankqa-1b-v2: model cards.
        Frame("nemotron-rerank", "question:{{ query }} \n \n passage:{{ document }}"),
        QUERY_DOCUMENT,
    )
}


def frame_of(name: str) -> Frame:
    """Returns a known frame, the one that a Jinja file holds, or the one whose template is given.

    Raises:
        ConfigError: There is neither a frame of this name nor such a file.
    """
    if name in FRAMES:
        return FRAMES[name]
    if "{{" in name:
        return Frame("custom", name)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"frame = {name!r} is not a valid value. Use one of: {', '.join(FRAMES)}, or the path of a Jinja template "
            "with {{ query }} and {{ document }}."
        )
    return Frame("custom", path.read_text(encoding="utf-8"))
