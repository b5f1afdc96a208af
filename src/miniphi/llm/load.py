"""`miniphi.load`: from a model's name to an LLM that is ready to answer.

Owns the order of the steps; each step is another room's.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from miniphi.chat import ChatTemplate, builtin_template
from miniphi.engine import Engine, EngineOptions, RopePolicy
from miniphi.engine.batch import KV_BLOCK_SIZE
from miniphi.engine.packed_file import PackedModel
from miniphi.engine.program import Program, load_program
from miniphi.errors import CheckpointError, InvalidRequestError
from miniphi.llm.model import LLM
from miniphi.llm.packed_copy import BackgroundWriter, PackedCopy, SavedModel
from miniphi.models import catalog, find_entry, resolve
from miniphi.tokenizer import Tokenizer

if TYPE_CHECKING:
    from miniphi.checkpoint import Checkpoint

__all__ = ["DEFAULT_MODEL", "load", "open_tokenizer"]

DEFAULT_MODEL = "smollm2-135m-instruct"

_PROBE = "The café's 1,024 naïve users: def f(x):\n    return x**2  # Привет, 世界, مرحبا, नमस्ते 🙂"


def load(
    name_or_path: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    num_threads: int | None = None,
    kv_type: str = "f16",
    context: int | None = None,
    kv_memory_bytes: int | None = None,
    rope_policy: RopePolicy = "auto",
    max_batch_tokens: int = 512,
    max_step_s: float | None = None,
    draft: str | os.PathLike[str] | None = None,
    packed_copy: bool = True,
    on_progress: Callable[[int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> LLM:
    """Make a model ready to answer.

    `name_or_path` is a catalog name (`miniphi models` lists them), a hub id that was pulled, a folder with safetensors
    or a .gguf file. Nothing is downloaded: `miniphi pull` or `miniphi.models.pull` does that.

    `kv_type` is the format of the key/value cache (f32, f16, q8 or q4). `context` is how many tokens a prompt and its
    answer may have together; without it, the model's whole context or as much of it as fits into memory.
    `kv_memory_bytes` limits the cache. `rope_policy` says which factor set a LongRoPE model uses; see RopePolicy.
    `max_step_s` bounds how long a long prompt holds up the tokens of requests beside it: see EngineOptions.
    `draft` names a smaller model with the same vocabulary, which guesses tokens ahead: answers come sooner and stay the
    same. `num_threads` defaults to what suits the machine. `on_progress` gets the bytes of each tensor.

    After the first answer a copy of the model is written to the cache in the layout that the kernels read, and later
    starts map that; `packed_copy=False`, or MINIPHI_PACKED_COPY=0 in the environment, neither writes nor reads one.
    `on_notice` gets a line for the user if the copy cannot be written, or the program's end has to wait for it.

    Raises:
        DownloadError: the model is not on this machine; the message says how to get it.
        CheckpointError: its files are damaged. UnsupportedModelError: they ask for what miniphi does not do.
        CapacityError: it does not fit into this machine's memory.
        InvalidRequestError: the draft model has another vocabulary.
    """
    path = resolve(name_or_path, revision=revision)
    copy = PackedCopy.of(path) if packed_copy else None
    model, saved = _open(path, copy)
    name = _name(name_or_path, revision)
    template = _chat_template(saved, name)
    draft_model = None if draft is None else _open_draft(draft, saved.tokenizer, packed_copy=packed_copy)
    program = load_program(
        model,
        num_threads=num_threads,
        kv_type=kv_type,
        context=context,
        kv_memory_bytes=kv_memory_bytes,
        max_batch_tokens=max_batch_tokens,
        beside=draft_model,
        on_progress=on_progress,
    )
    draft_program = None if draft_model is None else _load_draft(draft_model, program, num_threads, kv_type)
    options = EngineOptions(max_context=min(context or program.max_context, program.max_context), max_step_s=max_step_s)
    engine = _make_engine(program, draft_program, saved, template, options)
    missing_copy = None if isinstance(model, PackedModel) else copy
    on_first_rest = _copy_writer(missing_copy, program, saved, engine, on_notice)
    return LLM(engine, saved.tokenizer, template, name, rope_policy=rope_policy, on_first_rest=on_first_rest)


def _copy_writer(
    copy: PackedCopy | None,
    program: Program,
    saved: SavedModel,
    engine: Engine,
    on_notice: Callable[[str], None] | None,
) -> Callable[[], None] | None:
    """Return what begins to write the packed copy, giving way to the engine's work; None if there is none to write."""
    if copy is None:
        return None
    write = partial(copy.write, program.config, program.weights, saved)
    return BackgroundWriter(write, is_busy=lambda: engine.has_work, on_notice=on_notice).start


def _make_engine(
    program: Program, draft: Program | None, saved: SavedModel, template: ChatTemplate | None, options: EngineOptions
) -> Engine:
    stop_ids = {*program.config.eos_token_ids, *saved.eos_token_ids}
    return Engine(
        program,
        draft=draft,
        stop_token_ids=stop_ids if template is None else stop_ids | template.stop_ids,
        unused_token_ids=_unused_ids(saved.tokenizer, program.config.vocab_size),
        options=options,
    )


def _open_draft(
    name_or_path: str | os.PathLike[str], tokenizer: Tokenizer, *, packed_copy: bool
) -> "Checkpoint | PackedModel":
    path = resolve(name_or_path)
    model, saved = _open(path, PackedCopy.of(path) if packed_copy else None)
    if not _is_same_vocabulary(tokenizer, saved.tokenizer):
        raise InvalidRequestError(
            f"draft {os.fspath(name_or_path)}: has another vocabulary than the model; choose one of the same family"
        )
    return model


def _load_draft(model: "Checkpoint | PackedModel", program: Program, num_threads: int | None, kv_type: str) -> Program:
    """Give the draft model a cache for as many tokens as the model has, or as its positions allow."""
    longest = -(-model.config.max_position_embeddings // KV_BLOCK_SIZE)
    num_kv_blocks = min(program.num_kv_blocks, longest)
    return load_program(model, num_threads=num_threads, kv_type=kv_type, num_kv_blocks=num_kv_blocks)


def _is_same_vocabulary(first: Tokenizer, second: Tokenizer) -> bool:
    """Compare sizes, special tokens, and a text of many scripts: files of one vocabulary may still differ."""
    return (
        first.vocab_size == second.vocab_size
        and first.special_tokens == second.special_tokens
        and first.encode(_PROBE) == second.encode(_PROBE)
    )


def _open(path: Path, copy: PackedCopy | None) -> "tuple[Checkpoint | PackedModel, SavedModel]":
    found = None if copy is None else copy.open()
    if found is not None:
        return found
    # Most starts do without: they find a packed copy.
    from miniphi.checkpoint import open_checkpoint  # noqa: PLC0415

    checkpoint = open_checkpoint(path)
    return checkpoint, SavedModel(
        tokenizer=open_tokenizer(checkpoint),
        chat_template=checkpoint.chat_template,
        eos_token_ids=checkpoint.generation_eos_token_ids,
    )


def open_tokenizer(checkpoint: "Checkpoint") -> Tokenizer:
    """Return the tokenizer that comes with a checkpoint. Raises CheckpointError if none does."""
    source = checkpoint.tokenizer_source
    if source is None:
        raise CheckpointError(f"{checkpoint.path}: has no tokenizer.json; add the one of the original model")
    if source[0] == "files":
        return Tokenizer.from_files(source[1], source[2])
    return Tokenizer.from_gguf(source[1], source=str(checkpoint.path))


def _unused_ids(tokenizer: Tokenizer, vocab_size: int) -> set[int]:
    """Return the ids that stand for no text; a model's vocabulary may be larger than its tokenizer's."""
    inside = {token_id for token_id in tokenizer.unused_ids if token_id < vocab_size}
    return inside | set(range(tokenizer.vocab_size, vocab_size))


def _chat_template(saved: SavedModel, name: str) -> ChatTemplate | None:
    """Return the template that comes with the files, or the built-in one of a model that the catalog knows."""
    source = saved.chat_template or None
    if source is None and name.partition("@")[0] in catalog():
        source = builtin_template(find_entry(name).template)
    return None if source is None else ChatTemplate(source, saved.tokenizer)


def _name(name_or_path: str | os.PathLike[str], revision: str | None) -> str:
    text = os.fspath(name_or_path)
    if Path(text).expanduser().exists():
        path = Path(text).expanduser().resolve()
        return path.stem if path.is_file() else path.name
    return text if revision is None or "@" in text else f"{text}@{revision}"
