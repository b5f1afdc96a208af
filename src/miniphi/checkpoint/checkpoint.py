"""The door for reading: a path goes in, an open Checkpoint comes out.

Owns the decision what a path is.
"""

from pathlib import Path

from miniphi.checkpoint.gguf_model import open_gguf_model
from miniphi.checkpoint.hf_folder import PICKLE_SUFFIXES, open_hf_folder
from miniphi.checkpoint.stored import Checkpoint
from miniphi.errors import CheckpointError, UnsupportedModelError

__all__ = ["open_checkpoint"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder with safetensors, or a GGUF file. Maps the files; reads no weights.

    Raises CheckpointError if a file is missing, truncated, corrupt or inconsistent, and UnsupportedModelError if it
    asks for something miniphi does not do.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return open_hf_folder(path)
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if path.suffix in PICKLE_SUFFIXES:
        raise UnsupportedModelError(
            f"{path}: is a pickle, which can run any code when it is read; convert it to safetensors"
        )
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: holds weights only; name the folder that also has config.json")
    return open_gguf_model(path)
