"""Prompt and response -> text -> token ids, as a model reads them."""

from marginrm.encoding.encoded import EncodedGroup, EncodedResponse
from marginrm.encoding.encoder import Architecture, Encoder

__all__ = ["Architecture", "EncodedGroup", "EncodedResponse", "Encoder"]
