"""Text to token ids and back, over the `tokenizers` library.

Owns the vocabulary, the special tokens and their whitespace rules, and decoding piece by piece. Knows nothing of chat
templates or models: ids from `vocab_size` up to a model's larger vocabulary belong to the engine, which masks them.
"""

from miniphi.tokenizer.special_tokens import Piece, SpecialToken
from miniphi.tokenizer.tokenizer import StreamDecoder, Tokenizer

__all__ = ["Piece", "SpecialToken", "StreamDecoder", "Tokenizer"]
