"""A Hugging Face folder as a model: config.json, safetensors, generation_config.json and the tokenizer's files.

A folder that was made from a GGUF file keeps its tokenizer as that file had it: TOKENIZER_GGUF, without tensors. Owns
which file says what. The tokenizer is only located here, not read.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from miniphi.checkpoint.checks import check_count, check_names, check_shape, check_token_id
from miniphi.checkpoint.gguf import open_gguf
from miniphi.checkpoint.mapped_file import MappedFile, quoted
from miniphi.checkpoint.names import EMBEDDINGS, LM_HEAD, expected_shapes, is_harmless_surplus
from miniphi.checkpoint.safetensors import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsFile,
    open_safetensors,
    open_sharded_safetensors,
)
from miniphi.checkpoint.stored import Checkpoint, StoredTensor, TokenizerSource
from miniphi.checkpoint.strict_json import read_json_object
from miniphi.config import ModelConfig
from miniphi.errors import CheckpointError, UnsupportedModelError

__all__ = ["PICKLE_SUFFIXES", "TOKENIZER_GGUF", "open_hf_folder"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TOKENIZER_GGUF = "tokenizer.gguf"
_MAX_CONFIG_BYTES = 4 << 20
_MAX_TOKENIZER_CONFIG_BYTES = 16 << 20
_MAX_TEMPLATE_BYTES = 1 << 20


def open_hf_folder(folder: Path) -> Checkpoint:
    """Open a folder as a model. Raises CheckpointError or UnsupportedModelError naming the file and the key."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{folder}: has no config.json{_hint_at_gguf(folder)}")
    config = ModelConfig.from_hf(read_json_object(config_path, max_bytes=_MAX_CONFIG_BYTES), source=str(config_path))
    weights = _open_weights(folder)
    try:
        tokenizer_config = _read_optional(folder / "tokenizer_config.json", _MAX_TOKENIZER_CONFIG_BYTES)
        return Checkpoint(
            path=folder,
            config=config,
            tensors=_check_tensors(weights.tensors, config, folder),
            tokenizer_source=_find_tokenizer(folder, tokenizer_config),
            chat_template=_read_chat_template(folder, tokenizer_config),
            generation_eos_token_ids=_read_eos_ids(folder, config),
            metadata=dict(weights.metadata),
            files=weights.files,
        )
    except BaseException:
        for file in weights.files:
            file.close()
        raise


def _hint_at_gguf(folder: Path) -> str:
    found = sorted(folder.glob("*.gguf"))
    return f"; to open a GGUF file, name it: {found[0]}" if found else "; expected a Hugging Face model folder"


def _open_weights(folder: Path) -> SafetensorsFile:
    if (folder / SINGLE_NAME).is_file():
        return open_safetensors(folder / SINGLE_NAME)
    if (folder / INDEX_NAME).is_file():
        return open_sharded_safetensors(folder / INDEX_NAME)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UnsupportedModelError(
            f"{folder}: has {pickles[0]}, a pickle, which can run any code when it is read; convert it to safetensors"
        )
    raise CheckpointError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}")


def _check_tensors(tensors: Mapping[str, StoredTensor], config: ModelConfig, folder: Path) -> dict[str, StoredTensor]:
    check_count(config, len(tensors), folder)
    shapes = expected_shapes(config)
    surplus = [name for name in tensors if name not in shapes and not is_harmless_surplus(name)]
    if LM_HEAD in surplus and _is_copy(tensors, folder):
        surplus.remove(LM_HEAD)
    check_names(surplus, [name for name in shapes if name not in tensors], folder)
    for name, shape in shapes.items():
        check_shape(name, tensors[name].shape, shape, folder)
    return {name: tensors[name] for name in shapes}


def _is_copy(tensors: Mapping[str, StoredTensor], folder: Path) -> bool:
    """Tell whether a tied model's file repeats the embeddings as lm_head, as some tools write it."""
    head, embeddings = tensors[LM_HEAD], tensors.get(EMBEDDINGS)
    if embeddings is None:
        return False
    if head.format is not embeddings.format or not np.array_equal(head.raw, embeddings.raw):
        raise CheckpointError(
            f"{folder}: tie_word_embeddings is true, but {LM_HEAD} differs from {EMBEDDINGS}; set it to false in "
            "config.json, or remove the tensor"
        )
    return True


def _read_optional(path: Path, max_bytes: int) -> dict[str, object]:
    return read_json_object(path, max_bytes=max_bytes) if path.is_file() else {}


def _find_tokenizer(folder: Path, tokenizer_config: Mapping[str, object]) -> TokenizerSource | None:
    path = folder / "tokenizer.json"
    if path.is_file():
        return "files", path, tokenizer_config
    if not (folder / TOKENIZER_GGUF).is_file():
        return None
    vocabulary = open_gguf(folder / TOKENIZER_GGUF)
    vocabulary.file.close()
    return "gguf", vocabulary.metadata


def _read_chat_template(folder: Path, tokenizer_config: Mapping[str, object]) -> str | None:
    """Return the default chat template; chat_template.jinja goes before tokenizer_config.json, as in transformers."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        template = _default_template(template, where)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{where}: is {quoted(template)}, expected text or a list of named templates")
    return template


def _default_template(templates: list[object], where: str) -> object:
    for entry in templates:
        if not isinstance(entry, dict) or not {"name", "template"} <= set(entry):
            raise CheckpointError(f"{where}: expected objects with name and template, found {quoted(entry)}")
        if entry["name"] == "default":
            template: object = entry["template"]
            return template
    raise CheckpointError(f"{where}: is a list without a template named 'default'")


def _read_text(path: Path) -> str:
    file = MappedFile(path)
    try:
        if file.size > _MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{path}: has {file.size} bytes, expected at most {_MAX_TEMPLATE_BYTES}")
        return file.data.tobytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8: {error}") from None
    finally:
        file.close()


def _read_eos_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    value = _read_optional(path, _MAX_CONFIG_BYTES).get("eos_token_id")
    if value is None:
        return config.eos_token_ids
    ids = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(check_token_id(token_id, "eos_token_id", config, path) for token_id in ids))
