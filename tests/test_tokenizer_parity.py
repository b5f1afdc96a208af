"""The ids of others: llama.cpp (recorded and live), the `tokenizers` library, and the rule of SentencePiece."""

import gzip
import json
import random
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers

from miniphi.tokenizer import Tokenizer
from tests.shared_data import shared_path
from tests.vocabularies import phi3, phi3_metadata, smollm2, smollm2_metadata, tiny_bpe_metadata, tiny_spm_metadata

ALPHABET = "aA é\n\t \r<>|'sSrRe1２३½𝟙 漢字カがǅʰ\u200b\u3000\xa0🙂\u200d👩\u0301$+=^~_#/\\.,!?"


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Some hundred lines in many scripts, and random ones of awkward characters."""
    found: list[str] = []
    for name in ["mgsm", "agieval", "mmlu"]:
        found += [text for path in sorted(shared_path(f"eval/{name}").rglob("*")) for text in texts_of(path)]
    found += texts_of(shared_path("corpus/web_pages/mixed_pages.jsonl.gz"))
    found += texts_of(shared_path("instruct/code_alpaca_2k/train.jsonl.gz"))
    chance = random.Random(0)
    awkward = ["".join(chance.choices(ALPHABET, k=chance.randint(1, 40))) for _ in range(300)]
    return [*chance.sample([text[:1000] for text in found], 700), *awkward]


def texts_of(path: Path) -> list[str]:
    if path.suffixes[-2:] != [".jsonl", ".gz"]:
        return []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line, _ in zip(file, range(200), strict=False)]
    return [value for record in records for value in record.values() if isinstance(value, str) and value]


def test_llama_cpp_cases_of_phi3() -> None:
    cases = shared_path("tokenizer/ggml-vocab-phi-3.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    outputs = shared_path("tokenizer/ggml-vocab-phi-3.gguf.out").read_text().split("\n")
    expected = [[int(token_id) for token_id in line.split()] for line in outputs]

    assert len(cases) >= 46
    assert [phi3().encode(case) for case in cases] == expected[: len(cases)]
    assert [phi3().decode(ids) for ids in expected[: len(cases)]] == cases


@pytest.mark.parametrize(
    ("text", "ids"),
    [("分析", [29871, 30748, 233, 161, 147]), (" こんにちは", [259, 30589, 30389, 30353, 30644, 30449])],
)
def test_published_ids_of_phi3(text: str, ids: list[int]) -> None:
    assert phi3().encode(text) == ids


def test_published_ids_of_special_text() -> None:
    assert phi3().encode("Hello<|end|>", allow_special=True) == [15043, 32007]


def test_sentencepiece_joins_the_best_pair_first(lines: list[str]) -> None:
    metadata = phi3_metadata()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    normal = [token_id for token_id, token_type in enumerate(types) if token_type == 1]
    scores = {tokens[token_id]: metadata["tokenizer.ggml.scores"][token_id] for token_id in normal}
    ids = {tokens[token_id]: token_id for token_id in normal}

    for line in lines[::7]:
        text = line[:120]
        assert phi3().encode(text) == sentencepiece(text, scores, ids), text


def sentencepiece(text: str, scores: dict[str, float], ids: dict[str, int]) -> list[int]:
    """Join the neighbours whose piece scores best, leftmost first, until none joins; the rest are bytes."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[a + b], at) for at, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not pairs:
            return [i for piece in pieces for i in ([ids[piece]] if piece in ids else [3 + b for b in piece.encode()])]
        at = min(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


class TestLlamaCpp:
    """Live ids of llama.cpp, which reads a model of one small layer around the vocabulary."""

    @pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", "llama-bpe", "gpt-4o"])
    def test_byte_level(self, lines: list[str], tmp_path: Path, pre: str) -> None:
        self.check(smollm2_metadata() | {"tokenizer.ggml.pre": pre}, lines, tmp_path)

    def test_sentencepiece(self, lines: list[str], tmp_path: Path) -> None:
        self.check(phi3_metadata() | {"general.architecture": "llama"}, lines, tmp_path)

    def check(self, metadata: dict[str, Any], lines: list[str], folder: Path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        write_model(folder / "m.gguf", metadata)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(folder / "m.gguf")
        parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 64, 1, 1
        parameters.warmup, parameters.port = False, 0
        server = xllamacpp.Server(parameters)
        ours = Tokenizer.from_gguf(metadata, source="m.gguf")

        wrong = [line for line in lines if ours.encode(line) != tokenize(server.listening_address, line)]

        assert wrong == []


def tokenize(address: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        ids: list[int] = json.load(response)["tokens"]
    return ids


def write_model(path: Path, metadata: dict[str, Any]) -> None:
    width, tokens = 32, metadata["tokenizer.ggml.tokens"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    if "tokenizer.ggml.scores" in metadata:
        writer.add_token_scores(metadata["tokenizer.ggml.scores"])
    if "tokenizer.ggml.merges" in metadata:
        writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), width), np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(width, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((width, width), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_smollm2_as_published(lines: list[str]) -> None:
    """SmolLM2's tokenizer.json cuts with Digits and ByteLevel; the GGUF file only says "smollm"."""
    metadata = smollm2_metadata()
    vocab = {token: token_id for token_id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )

    assert [smollm2().encode(line) for line in lines] == [theirs.encode(line).ids for line in lines]


FLAGS = {
    "<|end|>": {"rstrip": True},
    "<|user|>": {"lstrip": True, "rstrip": True},
    "<|endoftext|>": {"lstrip": True},
    "<s>": {},
    "</s>": {"special": False, "rstrip": True},
}


def byte_level(full: tokenizers.Tokenizer) -> None:
    full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    full.decoder = decoders.ByteLevel()


def prepend(full: tokenizers.Tokenizer) -> None:
    full.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    full.decoder = sentencepiece_decoder()


def metaspace(scheme: str) -> Callable[[tokenizers.Tokenizer], None]:
    def apply(full: tokenizers.Tokenizer) -> None:
        full.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        full.decoder = sentencepiece_decoder(strips=scheme != "never")

    return apply


def sentencepiece_decoder(strips: bool = True) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)


PIPELINES = {
    "byte-level": byte_level,
    "prepend": prepend,
    "first": metaspace("first"),
    "always": metaspace("always"),
    "never": metaspace("never"),
}


@pytest.fixture(scope="module", params=PIPELINES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    """The `tokenizers` library with added tokens of every kind, and ours from the file that it writes."""
    if request.param == "byte-level":
        metadata = tiny_bpe_metadata()
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    else:
        metadata = tiny_spm_metadata()
        merges = [("h", "e"), ("l", "l"), ("▁", "he"), ("ll", "o"), ("▁he", "llo"), ("▁", "▁"), ("<", "/")]
    vocab = {token: token_id for token_id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    full = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, byte_fallback=request.param != "byte-level"))
    PIPELINES[request.param](full)
    for text, flags in FLAGS.items():
        full.add_tokens([AddedToken(text, normalized=False, **({"special": True} | flags))])  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("files") / "tokenizer.json"
    full.save(str(path))
    return full, Tokenizer.from_files(path, None)


segments = st.sampled_from([*FLAGS, "hello", "he llo", " ", "\n", "\x1c", "\u3000", "<|", "é", "🙂", "  hello ", "</"])


@settings(deadline=None, max_examples=300)
@given(parts=st.lists(segments, max_size=10))
def test_special_tokens_as_in_the_library(pair: tuple[tokenizers.Tokenizer, Tokenizer], parts: list[str]) -> None:
    theirs, ours = pair
    text = "".join(parts)

    assert ours.encode(text, allow_special=True) == theirs.encode(text).ids


@settings(deadline=None)
@given(parts=st.lists(st.sampled_from(["hello", " ", "he", "é", "🙂", "\n", "l"]), max_size=10))
def test_decoding_as_in_the_library(pair: tuple[tokenizers.Tokenizer, Tokenizer], parts: list[str]) -> None:
    theirs, ours = pair
    ids = theirs.encode("".join(parts)).ids

    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
