"""The vocabulary in a GGUF file's metadata, as llama.cpp writes it.

Two kinds: "gpt2" is byte-level BPE with the name of its pre-tokenizer, "llama" is SentencePiece BPE with scores.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from miniphi.errors import CheckpointError, UnsupportedModelError
from miniphi.tokenizer.special_tokens import SpecialToken
from miniphi.tokenizer.vocabulary import Prefix, Vocabulary, add_special

_KEY = "tokenizer.ggml."


class _Type(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_SPECIAL_TYPES = frozenset((_Type.UNKNOWN, _Type.CONTROL, _Type.USER_DEFINED))
_PADDING_TYPES = frozenset((_Type.UNKNOWN, _Type.UNUSED))

# The regular expressions by which public BPE models cut a text into words, by llama.cpp's name for them.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS: Mapping[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "gpt-4o": (_O200K,),
    "llama-bpe": (_LLAMA3,),
    "smollm": (r"\p{N}", _GPT2),
}

# Phi-3's control tokens swallow the whitespace after them, which GGUF has no place to say; these do not.
_PHI3_KEEPS_WHITESPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def vocabulary_from_gguf(metadata: Mapping[str, object], source: str) -> Vocabulary:
    """Build the vocabulary. Raises: CheckpointError, UnsupportedModelError."""
    kind = metadata.get(f"{_KEY}model")
    tokens, types = _strings(metadata, "tokens", source), _array(metadata, "token_type", source)
    num_distinct = len(set(tokens))
    if len(types) != len(tokens) or num_distinct != len(tokens):
        raise CheckpointError(
            f"{source}: {_KEY}tokens has {len(tokens)} tokens, of which {num_distinct} are distinct, "
            f"and {_KEY}token_type has {len(types)} types; expected equal numbers"
        )
    prefix = Prefix.NONE
    if kind == "gpt2":
        plain = _byte_level(metadata, tokens, source)
    elif kind == "llama":
        prefix = Prefix.SEGMENT if metadata.get(f"{_KEY}add_space_prefix", True) else Prefix.NONE
        plain = _sentencepiece(metadata, tokens, types, prefix, source)
    else:
        raise UnsupportedModelError(f"{source}: {_KEY}model is {kind!r}; supported are 'gpt2' (BPE) and 'llama' (SPM)")
    unused = _unused_ids(metadata, types)
    is_phi3 = kind == "llama" and metadata.get("general.architecture") == "phi3"
    special = [
        SpecialToken(
            id=token_id,
            text=tokens[token_id],
            rstrip=is_phi3 and tokens[token_id] not in _PHI3_KEEPS_WHITESPACE,
            is_control=token_type != _Type.USER_DEFINED,
        )
        for token_id, token_type in enumerate(types)
        if token_type in _SPECIAL_TYPES and token_id not in unused
    ]
    return Vocabulary(
        plain=plain,
        plain_inside=plain,
        is_byte_level=kind == "gpt2",
        prefix=prefix,
        special=add_special(plain, special, source),
        vocab_size=len(tokens),
        unused_ids=unused,
        bos_token_id=_token_id(metadata, "bos_token_id", len(tokens), source),
        eos_token_id=_token_id(metadata, "eos_token_id", len(tokens), source),
        add_bos=bool(
            metadata.get(f"{_KEY}add_bos_token", kind == "llama" or metadata.get(f"{_KEY}pre") == "llama-bpe")
        ),
    )


def _unused_ids(metadata: Mapping[str, object], types: Sequence[int]) -> frozenset[int]:
    """Return the ids of padding, which files of early 2024 call unknown although a vocabulary has one unknown token."""
    unknown = metadata.get(f"{_KEY}unknown_token_id", 0)
    return frozenset(
        token_id
        for token_id, token_type in enumerate(types)
        if token_type in _PADDING_TYPES and (token_type == _Type.UNUSED or token_id != unknown)
    )


def _byte_level(metadata: Mapping[str, object], tokens: Sequence[str], source: str) -> tokenizers.Tokenizer:
    name = metadata.get(f"{_KEY}pre")
    if name not in _WORDS:
        raise UnsupportedModelError(f"{source}: {_KEY}pre is {name!r}; supported are {', '.join(sorted(_WORDS))}")
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in _strings(metadata, "merges", source))]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    # Llama 3 takes a word that is in the vocabulary whole, even where no merges lead to it.
    plain = tokenizers.Tokenizer(_bpe(source, vocab=vocab, merges=merges, ignore_merges=name == "llama-bpe"))
    splits = [pre_tokenizers.Split(Regex(words), behavior="isolated") for words in _WORDS[str(name)]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    return plain


def _sentencepiece(
    metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[int], prefix: Prefix, source: str
) -> tokenizers.Tokenizer:
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if metadata.get(f"{_KEY}{key}"):
            raise UnsupportedModelError(f"{source}: {_KEY}{key} is set; SentencePiece normalisation is not supported")
    scores = _array(metadata, "scores", source)
    byte_pieces = {f"<0x{byte:02X}>" for byte in range(256)}
    missing = byte_pieces.difference(tokens)
    if missing or len(scores) != len(tokens):
        raise CheckpointError(
            f"{source}: {len(scores)} scores for {len(tokens)} tokens and {len(missing)} of 256 byte tokens missing; "
            "expected a score for every token and all bytes"
        )
    # Only ordinary pieces and bytes: what is not in this vocabulary, no text can become.
    vocab = {token: i for i, token in enumerate(tokens) if types[i] in (_Type.NORMAL, _Type.BYTE)}
    normal = [i for i in range(len(tokens)) if types[i] == _Type.NORMAL]
    merges = _merges_by_score(tokens, sorted(normal, key=scores.__getitem__, reverse=True))
    plain = tokenizers.Tokenizer(_bpe(source, vocab=vocab, merges=merges, byte_fallback=True))
    to_pieces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if prefix is not Prefix.NONE:
        to_pieces.insert(0, normalizers.Prepend("▁"))
    plain.normalizer = normalizers.Sequence(to_pieces)
    return plain


def _merges_by_score(tokens: Sequence[str], best_first: Sequence[int]) -> list[tuple[str, str]]:
    """Return every pair of pieces that joins to a piece, in the order in which SentencePiece prefers to join them."""
    pieces = {tokens[token_id] for token_id in best_first}
    return [
        (left, right)
        for piece in map(tokens.__getitem__, best_first)
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1))
        if left in pieces and right in pieces
    ]


def _bpe(source: str, *, vocab: dict[str, int], merges: list[tuple[str, str]], **options: bool) -> models.BPE:
    try:
        return models.BPE(vocab, merges, **options)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{source}: the vocabulary and its merges do not fit: {error}") from None


def _array(metadata: Mapping[str, object], name: str, source: str) -> Sequence[int]:
    values = metadata.get(f"{_KEY}{name}")
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise CheckpointError(f"{source}: {_KEY}{name} is missing or no array")
    return values


def _strings(metadata: Mapping[str, object], name: str, source: str) -> list[str]:
    values = _array(metadata, name, source)
    return [str(value) for value in values]


def _token_id(metadata: Mapping[str, object], name: str, vocab_size: int, source: str) -> int | None:
    token_id = metadata.get(f"{_KEY}{name}")
    if token_id is not None and not (isinstance(token_id, int) and 0 <= token_id < vocab_size):
        raise CheckpointError(f"{source}: {_KEY}{name} is {token_id!r}; expected an id below {vocab_size}")
    return token_id
