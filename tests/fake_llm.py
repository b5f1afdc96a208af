"""Small LLMs without a model for the tests of text: a byte-level tokenizer, a chat template, and fake programs."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from miniphi.chat import ChatTemplate
from miniphi.engine import Engine, EngineOptions
from miniphi.llm import LLM
from miniphi.testing import FakeProgram, fake_config
from miniphi.tokenizer import Tokenizer
from tests.checkpoint.tiny_models import byte_level_tokenizer, random_tensors, tiny_config, write_folder

MERGES = [("a", "b"), ("ab", "c"), ("t", "h"), ("th", "e"), ("Ã", "©")]
SPECIAL = ("<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def make_tokenizer(*, add_bos: bool = False) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, *("".join(pair) for pair in MERGES)])}
    full = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    full.decoder = decoders.ByteLevel()
    full.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    config = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "add_bos_token": add_bos}
    with TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        full.save(str(path))
        return Tokenizer.from_files(path, json.loads(json.dumps(config)))


def special_id(text: str) -> int:
    return make_tokenizer().special_tokens[text]


class EchoProgram(FakeProgram):
    """Answers with the last message of the user; continues a text without one with "abc" for ever."""

    def logits(self, context: NDArray[np.int32] | list[int], *, use_long_factors: bool = False) -> NDArray[np.float32]:
        logits = super().logits(context, use_long_factors=use_long_factors)
        logits[self._next(np.asarray(context).tolist())] = 50.0
        return logits

    @staticmethod
    def _next(context: list[int]) -> int:
        user, assistant, end = map(special_id, ("<|user|>", "<|assistant|>", "<|end|>"))
        if assistant not in context or user not in context:
            return make_tokenizer().encode("abc")[0]
        answer_start = len(context) - context[::-1].index(assistant)
        question_start = len(context) - context[::-1].index(user)
        question = context[question_start : answer_start - 2]
        position = len(context) - answer_start
        return question[position] if position < len(question) else end


def make_llm(
    program: type[FakeProgram] = EchoProgram,
    *,
    num_kv_blocks: int = 64,
    context: int = 2048,
    max_batch_tokens: int = 128,
    add_bos: bool = False,
    has_template: bool = True,
    draft_row_cost: float = 1.0,
) -> LLM:
    """Make an LLM that by default never guesses ahead: a row as dear as a step."""
    tokenizer = make_tokenizer(add_bos=add_bos)
    config = fake_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=context)
    fake = program(config, num_kv_blocks=num_kv_blocks, max_batch_tokens=max_batch_tokens)
    options = EngineOptions(max_context=context, draft_row_cost=draft_row_cost)
    engine = Engine(fake, stop_token_ids={special_id("<|end|>")}, options=options)
    template = ChatTemplate(TEMPLATE, tokenizer) if has_template else None
    return LLM(engine, tokenizer, template, "fake")


def write_tiny_model(folder: Path) -> Path:
    """Write a random model with tokenizer and template as a Hugging Face folder."""
    tokenizer_config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}",
    }
    files = {
        "tokenizer.json": byte_level_tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config).encode(),
    }
    config = tiny_config()
    return write_folder(folder, config, random_tensors(config), extra=files)


def engine_of(llm: LLM) -> Engine:
    return llm._engine
