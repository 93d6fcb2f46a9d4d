"""Prompt and response -> text -> token ids, as a model reads them."""

from marginrm.encoding.encoder import Architecture, EncodedGroup, EncodedResponse, Encoder

__all__ = ["Architecture", "EncodedGroup", "EncodedResponse", "Encoder"]
