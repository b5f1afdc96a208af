import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from miniphi.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from miniphi.tokenizer import Tokenizer
from tests.vocabularies import phi3, smollm2, tiny_bpe, tiny_bpe_metadata, tiny_spm, tiny_spm_metadata

TINY = [tiny_bpe, tiny_spm]
REAL = [smollm2, phi3]
ALL = [*TINY, *REAL]

scripts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
specials = st.sampled_from(
    [
        "<|end|>",
        "<|user|>",
        "<|im_end|>",
        "<|endoftext|>",
        "</s>",
        "<s>",
        "<|",
        "|>",
        "end",
        " ",
        "\n",
        "hello",
        "<0x0A>",
    ]
)
mixed = st.lists(st.one_of(specials, scripts), max_size=8).map("".join)


@cache
def smollm2_bytes() -> frozenset[int]:
    return frozenset(byte for token_id in range(49152) for byte in smollm2().token_bytes(token_id))


def from_bpe(**changes: Any) -> Tokenizer:
    metadata = tiny_bpe_metadata() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return Tokenizer.from_gguf({key: value for key, value in metadata.items() if value != "absent"}, source="m.gguf")


def from_spm(architecture: str = "phi3", **changes: Any) -> Tokenizer:
    metadata = tiny_spm_metadata(architecture) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return Tokenizer.from_gguf({key: value for key, value in metadata.items() if value != "absent"}, source="m.gguf")


@pytest.mark.parametrize("make", ALL)
class TestEveryVocabulary:
    @settings(deadline=None)
    @given(text=mixed)
    def test_text_comes_back(self, make: Callable[[], Tokenizer], text: str) -> None:
        tokenizer = make()
        expected = text
        if make is smollm2:  # its vocabulary lacks some bytes
            expected = bytes(byte for byte in text.encode() if byte in smollm2_bytes()).decode(errors="replace")

        assert tokenizer.decode(tokenizer.encode(text)) == expected

    @settings(deadline=None)
    @given(text=mixed)
    def test_plain_text_never_becomes_a_special_token(self, make: Callable[[], Tokenizer], text: str) -> None:
        tokenizer = make()

        assert not set(tokenizer.encode(text)) & set(tokenizer.special_tokens.values())

    @settings(deadline=None)
    @given(data=st.data())
    def test_stream_is_the_whole_for_any_ids(self, make: Callable[[], Tokenizer], data: st.DataObject) -> None:
        tokenizer = make()
        used = sorted(set(range(tokenizer.vocab_size)) - tokenizer.unused_ids)
        ids = data.draw(st.lists(st.sampled_from(used), max_size=30))
        after = data.draw(st.one_of(st.none(), st.sampled_from(used)))
        skip = data.draw(st.booleans())

        stream = tokenizer.stream_decoder(skip_special=skip, after=after)
        parts = [*map(stream.push, ids), stream.flush()]

        assert "".join(parts) == tokenizer.decode(ids, skip_special=skip, after=after)

    @settings(deadline=None)
    @given(text=mixed)
    def test_starts_are_where_tokens_start(self, make: Callable[[], Tokenizer], text: str) -> None:
        tokenizer = make()
        tokens = tokenizer.encode_plain_with_starts(text, 7)
        starts = [start for _, start in tokens]

        assert [token_id for token_id, _ in tokens] == tokenizer.encode_plain(text, 7)
        assert starts == sorted(starts)
        assert all(7 <= start < 7 + len(text) for start in starts)

    def test_empty_text_has_no_tokens(self, make: Callable[[], Tokenizer]) -> None:
        assert make().encode("") == make().encode("", allow_special=True) == []
        assert make().decode([]) == ""

    def test_lone_surrogate_is_refused(self, make: Callable[[], Tokenizer]) -> None:
        with pytest.raises(InvalidRequestError, match=r"character 2 is the lone surrogate '\\udc80'"):
            make().encode("ab\udc80")

    @pytest.mark.parametrize("token_id", [-1, 1 << 40])
    def test_unknown_id_is_refused(self, make: Callable[[], Tokenizer], token_id: int) -> None:
        with pytest.raises(InvalidRequestError, match=f"token id {token_id} is not in the vocabulary"):
            make().decode([token_id])


@pytest.mark.parametrize("make", [tiny_bpe, smollm2])
def test_stream_holds_back_half_characters(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    stream = tokenizer.stream_decoder()
    ids = [
        token_id
        for byte in "é🙂".encode()
        for token_id in range(tokenizer.vocab_size)
        if is_byte(tokenizer, token_id, byte)
    ]

    assert [stream.push(token_id) for token_id in ids] == ["", "é", "", "", "", "🙂"]
    assert stream.push(ids[0]) == ""
    assert stream.flush() == "\ufffd"


def is_byte(tokenizer: Tokenizer, token_id: int, byte: int) -> bool:
    return tokenizer.token_bytes(token_id) == bytes((byte,))


def test_byte_fallback_holds_back_and_replaces() -> None:
    tokenizer = tiny_spm()
    stream = tokenizer.stream_decoder(after=tokenizer.encode("h")[-1])
    first, second, third = (3 + byte for byte in "€".encode())

    assert [stream.push(token_id) for token_id in (first, second, third)] == ["", "", "€"]
    assert [stream.push(token_id) for token_id in (first, tokenizer.special_tokens["<|end|>"])] == ["", "\ufffd<|end|>"]
    assert tokenizer.decode([first, second]) == "\ufffd"


def test_special_tokens_and_what_is_around_them() -> None:
    tokenizer = tiny_bpe()
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    hello = tokenizer.encode("hello")

    assert len(hello) == 1
    assert tokenizer.encode("<|im_start|>hello<|im_end|>", allow_special=True) == [start, *hello, end]
    assert tokenizer.decode([start, *hello, end]) == "<|im_start|>hello<|im_end|>"
    assert tokenizer.decode([start, *hello, end], skip_special=True) == "hello"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.add_bos) == (start, end, False)
    assert (tokenizer.token_text(hello[0]), tokenizer.token_bytes(hello[0])) == ("hello", b"hello")


def test_longest_special_token_wins() -> None:
    tokens = [*tiny_bpe_metadata()["tokenizer.ggml.tokens"], "<|im_end|>x"]
    types = [*tiny_bpe_metadata()["tokenizer.ggml.token_type"], 3]
    tokenizer = from_bpe(tokens=tokens, token_type=types)

    assert tokenizer.encode("<|im_end|>x<|im_end|>", allow_special=True) == [len(tokens) - 1, 2]


class TestPhi3Rules:
    """Model of the whitespace rules: every control token but <|endoftext|>, <unk> and <s> swallows what follows."""

    def test_whitespace_after_special_tokens(self) -> None:
        tokenizer = tiny_spm()
        hello = tokenizer.encode("hello")
        ids = tokenizer.special_tokens

        assert hello == [tokenizer.encode_plain("hello")[0]]
        for text, keeps in {
            "<|end|>": False,
            "<|user|>": False,
            "</s>": False,
            "<s>": True,
            "<|endoftext|>": True,
        }.items():
            encoded = tokenizer.encode(f"{text}\n\u3000hello", allow_special=True)
            assert encoded[0] == ids[text]
            assert (encoded[1:] == hello) == (not keeps)
            assert (encoded[1:] == tokenizer.encode("\n\u3000hello")) == keeps

    def test_other_architectures_keep_whitespace(self) -> None:
        tokenizer = from_spm("llama")

        assert tokenizer.encode("<|end|>\nhello", allow_special=True)[1:] == tokenizer.encode("\nhello")

    def test_each_segment_has_its_own_space_and_loses_it_again(self) -> None:
        tokenizer = tiny_spm()
        text = "hello<|endoftext|>hello<|end|>  hello"

        ids = tokenizer.encode(text, allow_special=True)

        assert [tokenizer.token_text(token_id) for token_id in ids] == [
            "▁hello", "<|endoftext|>", "▁hello", "<|end|>", "▁hello",
        ]  # fmt: skip
        assert tokenizer.decode(ids) == "hello<|endoftext|>hello<|end|>hello"

    def test_continued_text_keeps_its_space(self) -> None:
        tokenizer = tiny_spm()
        (hello,) = tokenizer.encode("hello")

        assert tokenizer.decode([hello]) == "hello"
        assert tokenizer.decode([hello], after=tokenizer.special_tokens["<|assistant|>"]) == "hello"
        assert tokenizer.decode([hello], after=hello) == " hello"

    def test_unused_ids(self) -> None:
        assert tiny_spm().unused_ids == {tiny_spm().vocab_size - 1}
        assert tiny_bpe().unused_ids == frozenset()
        assert phi3().unused_ids == set(range(32011, 32064))

    def test_user_defined_tokens_are_shown_and_others_are_not(self) -> None:
        tokenizer = tiny_spm()
        ids = [tokenizer.special_tokens["</s>"], tokenizer.special_tokens["<|end|>"]]

        assert tokenizer.decode(ids, skip_special=True) == "</s>"

    def test_bos_is_for_the_caller_to_add(self) -> None:
        assert (tiny_spm().add_bos, from_spm(add_bos_token=False).add_bos) == (True, False)
        assert tiny_spm().encode("hello")[0] != tiny_spm().bos_token_id


def test_no_space_prefix_where_the_file_says_so() -> None:
    tokenizer = from_spm(add_space_prefix=False)

    assert [tokenizer.token_text(token_id) for token_id in tokenizer.encode("he")] == ["he"]
    assert tokenizer.decode(tokenizer.encode(" he")) == " he"


def test_unused_and_control_pieces_do_not_merge() -> None:
    """The pieces "</s" and "s>" would join to "</s>" if it were an ordinary piece."""
    texts = [tiny_spm().token_text(token_id) for token_id in tiny_spm().encode("</s>")]

    assert "</s>" not in texts
    assert "".join(texts) == "▁</s>"


def test_whitespace_tokens_are_ordinary_text() -> None:
    metadata = tiny_bpe_metadata()
    tokens, types = [*metadata["tokenizer.ggml.tokens"], "    "], [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = from_bpe(tokens=tokens, token_type=types)

    assert tokenizer.encode("    h")[0] == len(tokens) - 1
    assert tokenizer.decode(tokenizer.encode("    h")) == "    h"
    assert "    " not in tokenizer.special_tokens


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pre": "deepseek-llm"}, "pre is 'deepseek-llm'; supported are default, gpt-2, gpt-4o, llama-bpe, smollm"),
        ({"pre": "absent"}, "pre is None"),
        ({"model": "bert"}, "model is 'bert'"),
        ({"model": "absent"}, "model is None"),
    ],
)
def test_unsupported_gguf_vocabularies_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"^m\.gguf: tokenizer\.ggml\.{named}"):
        from_bpe(**changes)


@pytest.mark.parametrize("key", ["remove_extra_whitespaces", "precompiled_charsmap"])
def test_sentencepiece_normalisation_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        from_spm(**{key: [1, 2]})


def test_a_control_token_that_text_can_spell_is_refused() -> None:
    metadata = tiny_bpe_metadata()
    types = list(metadata["tokenizer.ggml.token_type"])
    types[metadata["tokenizer.ggml.tokens"].index("hello")] = 3

    with pytest.raises(UnsupportedModelError, match=r"'hello'.*forged"):
        from_bpe(token_type=types)
    types[metadata["tokenizer.ggml.tokens"].index("hello")] = 4
    assert "hello" not in from_bpe(token_type=types).special_tokens


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokens": "absent"}, "tokens is missing"),
        ({"token_type": "absent"}, "token_type is missing"),
        ({"token_type": [1]}, "1 types"),
        ({"tokens": ["a"] * 270}, "of which 1 are distinct"),
        ({"merges": "absent"}, "merges is missing"),
        ({"merges": ["q absent"]}, "merges do not fit"),
        ({"bos_token_id": 5000}, "bos_token_id is 5000"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
    ],
)
def test_damaged_gguf_vocabularies_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^m\.gguf: .*{named}"):
        from_bpe(**changes)


@pytest.mark.parametrize("changes", [{"scores": [0.0]}, {"scores": "absent"}])
def test_damaged_scores_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="scores"):
        from_spm(**changes)


def test_missing_bytes_are_named() -> None:
    tokens = list(tiny_spm_metadata()["tokenizer.ggml.tokens"])
    tokens[10] = "<0xZZ>"

    with pytest.raises(CheckpointError, match="1 of 256 byte tokens missing"):
        from_spm(tokens=tokens)


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        model = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "<|end|>": 3, "Ġ": 6}, [("a", "b")])
        full = tokenizers.Tokenizer(model)
        full.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        full.decoder = tokenizers.decoders.ByteLevel()
        full.add_special_tokens([tokenizers.AddedToken("<|end|>", normalized=False)])
        full.enable_truncation(1)
        full.enable_padding(length=9)
        full.save(str(tmp_path / "tokenizer.json"))
        return tmp_path / "tokenizer.json"

    def test_truncation_and_padding_are_ignored(self, path: Path) -> None:
        tokenizer = Tokenizer.from_files(path, None)

        assert tokenizer.encode("ab a<|end|>", allow_special=True) == [2, 6, 0, 3]
        assert (tokenizer.vocab_size, tokenizer.unused_ids) == (7, {4, 5})
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.add_bos) == (None, None, False)

    @pytest.mark.parametrize("eos", ["<|end|>", {"content": "<|end|>", "lstrip": False}])
    def test_config_names_and_corrects_tokens(self, path: Path, eos: object) -> None:
        end = {"content": "<|end|>", "rstrip": True, "special": True}
        config = {"eos_token": eos, "bos_token": "<|end|>", "add_bos_token": True, "added_tokens_decoder": {"3": end}}

        tokenizer = Tokenizer.from_files(path, config)

        assert tokenizer.encode("<|end|> \n a", allow_special=True) == [3, 0]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.add_bos) == (3, 3, True)

    def test_post_processor_tells_about_bos(self, path: Path) -> None:
        full = tokenizers.Tokenizer.from_file(str(path))
        full.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", 3)]
        )
        full.no_truncation()
        full.save(str(path))

        assert Tokenizer.from_files(path, {"bos_token": "<|end|>"}).add_bos
        assert not Tokenizer.from_files(path, {"bos_token": "<|end|>", "add_bos_token": False}).add_bos

    @pytest.mark.parametrize("content", ["", "{}", "[1", '{"version": "1.0"}'])
    def test_damage_is_named(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "t.json").write_text(content)

        with pytest.raises(CheckpointError, match=r"t\.json: not a tokenizer\.json"):
            Tokenizer.from_files(tmp_path / "t.json", None)

    def test_absence_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"t\.json: there is no such file"):
            Tokenizer.from_files(tmp_path / "t.json", None)

    def test_unknown_bos_is_named(self, path: Path) -> None:
        with pytest.raises(CheckpointError, match="bos_token '<s>'"):
            Tokenizer.from_files(path, {"bos_token": "<s>"})

    @pytest.mark.parametrize(
        ("section", "value", "named"),
        [
            ("model", {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}, "WordPiece"),
            ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "the decoder is WordPiece"),
            ("decoder", None, "the decoder is missing"),
        ],
    )
    def test_other_kinds_are_named(self, path: Path, section: str, value: object, named: str) -> None:
        state = json.loads(path.read_text())
        if section == "model":
            value = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100} | dict(value)  # type: ignore[call-overload]
        path.write_text(json.dumps(state | {section: value, "added_tokens": []}))

        with pytest.raises(UnsupportedModelError, match=named):
            Tokenizer.from_files(path, None)

    def test_single_word_tokens_are_refused(self, path: Path) -> None:
        config = {"added_tokens_decoder": {"3": {"content": "<|end|>", "single_word": True}}}

        with pytest.raises(UnsupportedModelError, match="single_word"):
            Tokenizer.from_files(path, config)
