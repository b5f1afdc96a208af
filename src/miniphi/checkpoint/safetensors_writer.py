"""Writer of Hugging Face model folders: config.json, safetensors (sharded if large), and files that go with them.

Owns the layout of the folder. The tensors stream through, a few rows at a time.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from miniphi.atomic_write import atomic_folder, check_free_space, write_file
from miniphi.checkpoint.formats import Format
from miniphi.checkpoint.safetensors import BLOCKS_KEY, INDEX_NAME, SINGLE_NAME
from miniphi.checkpoint.stored import TensorSource
from miniphi.checkpoint.streaming import Tensors, check_columns, check_sources, stream_tensor
from miniphi.config import ModelConfig
from miniphi.errors import CheckpointError

__all__ = ["save_safetensors"]

_DTYPES = {Format.F32: "F32", Format.F16: "F16", Format.BF16: "BF16"}
_BLOCK_DTYPE = "U8"
_HEADER_ALIGNMENT = 8  # bytes; the reference writer pads so too, and F32 data stays aligned


def save_safetensors(
    folder: Path,
    config: ModelConfig,
    tensors: Tensors,
    *,
    extra_files: Mapping[str, bytes | Path] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    num_threads: int = 1,
    on_tensor: Callable[[str], None] | None = None,
) -> None:
    """Write a model as a folder that Hugging Face tools and `open_checkpoint` read. It appears complete or not at all.

    Quantised tensors become U8 arrays that only miniphi understands; see safetensors.py. `extra_files` maps names to
    contents or to files to copy (tokenizer.json, generation_config.json, ...). With `num_threads` > 1, `read_rows` of a
    source is called from several threads. `on_tensor` is called with each name once it is written.
    Raises CheckpointError if a tensor is missing, surplus or has another shape than `config` says; StorageError if the
    folder exists and is not empty, or the disk is full.
    """
    sources = check_sources(config, tensors)
    check_columns(sources)
    shards = _plan_shards(sources, max_shard_bytes)
    with atomic_folder(folder) as temporary:
        check_free_space(temporary, sum(source.num_bytes for source in sources.values()))
        with ThreadPoolExecutor(num_threads, thread_name_prefix="miniphi-write") as pool:
            for shard in shards:
                _write_shard(
                    temporary / shard.file_name,
                    shard.sources,
                    pool if num_threads > 1 else None,
                    num_threads,
                    on_tensor,
                )
        if len(shards) > 1:
            write_file(temporary / INDEX_NAME, _index(shards))
        write_file(temporary / "config.json", _json_bytes(config.to_hf()))
        for name, content in (extra_files or {}).items():
            write_file(
                temporary / _check_file_name(name), content if isinstance(content, bytes) else content.read_bytes()
            )


@dataclass(frozen=True, kw_only=True)
class _Shard:
    file_name: str
    sources: Mapping[str, TensorSource]


def _plan_shards(sources: Mapping[str, TensorSource], max_shard_bytes: int) -> list[_Shard]:
    groups: list[dict[str, TensorSource]] = [{}]
    used = 0
    for name, source in sources.items():
        if groups[-1] and used + source.num_bytes > max_shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = source
        used += source.num_bytes
    if len(groups) == 1:
        return [_Shard(file_name=SINGLE_NAME, sources=groups[0])]
    return [
        _Shard(file_name=f"model-{number:05d}-of-{len(groups):05d}.safetensors", sources=group)
        for number, group in enumerate(groups, start=1)
    ]


def _write_shard(
    path: Path,
    sources: Mapping[str, TensorSource],
    pool: ThreadPoolExecutor | None,
    num_threads: int,
    on_tensor: Callable[[str], None] | None,
) -> None:
    # Wider types first, so that every tensor lies at a multiple of its own item size.
    ordered = sorted(sources.items(), key=lambda item: -_item_bytes(item[1].format))
    text = json.dumps(_shard_header(ordered), separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, source in ordered:
            stream_tensor(file, source, pool=pool, num_threads=num_threads)
            if on_tensor is not None:
                on_tensor(name)
        file.flush()
        os.fsync(file.fileno())


def _item_bytes(fmt: Format) -> int:
    return fmt.block_bytes if fmt in _DTYPES else 1


def _shard_header(ordered: list[tuple[str, TensorSource]]) -> dict[str, object]:
    metadata = {"format": "pt"}
    header: dict[str, object] = {"__metadata__": metadata}
    blocks: dict[str, object] = {}
    position = 0
    for name, source in ordered:
        end = position + source.num_bytes
        shape = list(source.shape)
        if source.format not in _DTYPES:
            blocks[name] = {"format": source.format.name, "columns": shape[-1]}
            shape = [source.num_rows, source.format.row_bytes(shape[-1])]
        header[name] = {
            "dtype": _DTYPES.get(source.format, _BLOCK_DTYPE),
            "shape": shape,
            "data_offsets": [position, end],
        }
        position = end
    if blocks:
        metadata[BLOCKS_KEY] = json.dumps(blocks, separators=(",", ":"))
    return header


def _index(shards: list[_Shard]) -> bytes:
    weight_map = {name: shard.file_name for shard in shards for name in shard.sources}
    total = sum(source.num_bytes for shard in shards for source in shard.sources.values())
    return _json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})


def _json_bytes(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _check_file_name(name: str) -> str:
    if Path(name).name != name or name.startswith("."):
        raise CheckpointError(f"extra file {name!r}: expected a plain file name")
    return name
