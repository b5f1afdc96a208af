import pytest

from miniphi.errors import DownloadError
from miniphi.models.selection import choose_files


def test_the_usual_repository() -> None:
    names = [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
        "a.py",
        ".gitattributes",
        "x/y.json",
    ]
    assert choose_files(names, where="it") == ("config.json", "model.safetensors", "tokenizer.json")


def test_safetensors_come_before_gguf_and_model_files_before_others() -> None:
    names = ["config.json", "model-1.safetensors", "consolidated.safetensors", "m.gguf"]
    assert choose_files(names, where="it") == ("config.json", "model-1.safetensors")
    assert choose_files(names, wanted="m.gguf", where="it") == ("m.gguf",)
    assert choose_files(["weights.safetensors", "config.json"], where="it") == ("config.json", "weights.safetensors")


@pytest.mark.parametrize("name", ["../m.gguf", "/etc/m.gguf", "a/../../m.gguf", "a\\m.gguf", "c:m.gguf"])
def test_a_name_that_leaves_the_folder_is_refused(name: str) -> None:
    with pytest.raises(DownloadError, match="would leave the model's folder"):
        choose_files([name], where="it")
    with pytest.raises(DownloadError, match="would leave the model's folder"):
        choose_files([name], wanted=name, where="it")
