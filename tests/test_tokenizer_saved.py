"""A saved vocabulary is the same tokenizer, also where a short text is encoded with a part of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers

from miniphi import CheckpointError
from miniphi.tokenizer import Tokenizer
from miniphi.tokenizer.saved import SavedPipeline
from tests.checkpoint.tiny_models import byte_level_tokenizer, sentencepiece_tokenizer
from tests.vocabularies import phi3, smollm2, tiny_bpe, tiny_bpe_metadata, tiny_spm

TEXTS = st.text(max_size=60) | st.text(alphabet="the cat \n\t12é你<0x>▁", max_size=200)


def from_files(folder: Path, tokenizer: tokenizers.Tokenizer, **config: object) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    return Tokenizer.from_files(path, config)


def restored(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_saved(tokenizer.save())


def check(tokenizer: Tokenizer, text: str) -> None:
    """Compare the way of short texts and that of the whole vocabulary."""
    short, whole = restored(tokenizer), restored(tokenizer)
    whole._vocabulary.plain.to_str()
    for each in (short, whole):
        assert each.encode(text) == tokenizer.encode(text)
        assert each.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)
        assert each.encode_plain_with_starts(text, 1) == tokenizer.encode_plain_with_starts(text, 1)


@pytest.mark.parametrize("make", [tiny_bpe, tiny_spm])
@settings(max_examples=30, deadline=None)
@given(text=TEXTS)
def test_tiny_vocabularies_encode_alike(make: Callable[[], Tokenizer], text: str) -> None:
    check(make(), text)


def hugging_face_tokenizer(name: str) -> tokenizers.Tokenizer:
    if name == "bytes":
        return byte_level_tokenizer()
    tokenizer = sentencepiece_tokenizer()
    tokenizer.decoder = decoders.ByteFallback()
    if name == "metaspace":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", "metaspace"])
@settings(max_examples=30, deadline=None)
@given(text=TEXTS)
def test_hugging_face_files_encode_alike(name: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(from_files(tmp_path_factory.mktemp("files"), hugging_face_tokenizer(name)), text)


def test_words_taken_whole_without_merges(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(tiny_bpe_metadata(pre="llama-bpe"), source="tiny")
    check(tokenizer, "the cat")


@pytest.mark.parametrize("make", [phi3, smollm2])
def test_real_vocabularies_encode_alike(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    short, whole = restored(tokenizer), restored(tokenizer)
    whole._vocabulary.plain.to_str()
    texts = [
        "Tell me a story.",
        "",
        " ",
        "\n\n  def f(x):\n\treturn x**2  # é 你好 🙂",
        "<|end|><s> 1984 ▁▁",
        "a" * 300,
    ]
    for text in [*texts, "The quick brown fox. " * 100]:
        assert short.encode(text) == whole.encode(text) == tokenizer.encode(text)
    vocabulary = short._vocabulary.plain
    assert isinstance(vocabulary, SavedPipeline)
    assert vocabulary.to_str() == tokenizer._vocabulary.plain.to_str()


@pytest.mark.parametrize("make", [phi3, smollm2, tiny_bpe, tiny_spm])
def test_everything_else_is_the_same(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    again = restored(restored(tokenizer))
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "add_bos", "special_tokens", "unused_ids"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    ids = [token_id for token_id in range(tokenizer.vocab_size) if token_id not in tokenizer.unused_ids]
    assert [again.token_bytes(token_id) for token_id in ids] == [tokenizer.token_bytes(token_id) for token_id in ids]
    assert again.decode(ids) == tokenizer.decode(ids)


def test_a_pipeline_with_whitespace_tokens_is_kept_whole(tmp_path: Path) -> None:
    source = byte_level_tokenizer()
    source.add_tokens([AddedToken("   ", special=False, normalized=False)])
    tokenizer = from_files(tmp_path, source)
    assert not isinstance(restored(tokenizer)._vocabulary.plain, SavedPipeline)
    check(tokenizer, "the   cat  sat    on")
    assert len(tokenizer.encode("the   cat")) == len(tokenizer.encode("the")) + 1 + len(tokenizer.encode("cat"))


def test_many_short_texts_end_in_the_whole_vocabulary() -> None:
    tokenizer = restored(tiny_bpe())
    pipeline = tokenizer._vocabulary.plain
    assert isinstance(pipeline, SavedPipeline)
    for _ in range(40):
        assert tokenizer.encode("the cat") == tiny_bpe().encode("the cat")
    assert "_whole" in vars(pipeline)


def test_what_is_not_a_vocabulary_is_refused() -> None:
    data = tiny_bpe().save()
    for wrong in (b"", b"\0\0\0\0", data[:-1], data[1:], data[:4] + data[-40:], json.dumps([]).encode()):
        with pytest.raises(CheckpointError, match="saved vocabulary"):
            Tokenizer.from_saved(wrong)
