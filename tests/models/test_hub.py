import hashlib
import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from miniphi.errors import DownloadError, InvalidRequestError
from miniphi.models import find_entry, installed, pull, remove, resolve

from .fake_hub import FakeHub

WEIGHTS = bytes(range(256)) * 4_000
MODEL = {
    "config.json": b'{"model_type": "phi3"}',
    "generation_config.json": b"{}",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": b"sentencepiece",
    "chat_template.jinja": b"{{ messages }}",
    "consolidated.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "modeling_phi3.py": b"raise SystemExit",
    "README.md": b"# a model",
    "onnx/config.json": b"{}",
}
TAKEN = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
}
SHARD = "model-00001-of-00002.safetensors"


def names_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def pull_error(*args: str, **options: str) -> str:
    with pytest.raises(DownloadError) as caught:
        pull(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_pull_takes_the_models_files_and_nothing_else(hub: FakeHub, cache: Path) -> None:
    commit = hub.add("org/tiny", MODEL)
    folder = pull("org/tiny")
    assert folder == cache / "org--tiny"
    assert names_under(folder) == TAKEN | {"miniphi.json"}
    for name in TAKEN:
        assert (folder / name).read_bytes() == MODEL[name]
    manifest = json.loads((folder / "miniphi.json").read_text())
    assert manifest["provenance"] == {"source": "hub:org/tiny", "revision": None, "commit": commit}
    assert {file["name"]: (file["size"], file["sha256"]) for file in manifest["files"]} == {
        name: (len(MODEL[name]), hashlib.sha256(MODEL[name]).hexdigest()) for name in TAKEN
    }
    assert names_under(cache) == {f"org--tiny/{name}" for name in names_under(folder)} | {".locks/org--tiny.lock"}


def test_a_second_pull_asks_the_hub_nothing(hub: FakeHub) -> None:
    hub.add("org/tiny", MODEL)
    first = pull("org/tiny")
    asked = len(hub.requests)
    assert pull("org/tiny") == first == resolve("org/tiny")
    assert len(hub.requests) == asked
    pull("org/tiny", force=True)
    assert len(hub.requests) > asked


def test_a_revision_has_its_own_folder_and_is_pinned_to_its_commit(hub: FakeHub, cache: Path) -> None:
    hub.add("org/tiny", MODEL)
    old = {**MODEL, "config.json": b'{"model_type": "phi3", "old": true}'}
    commit = hub.add("org/tiny", old, revision="refs/pr/1")
    folder = pull("org/tiny@refs/pr/1")
    assert folder == cache / "org--tiny@refs--pr--1" == resolve("org/tiny", revision="refs/pr/1")
    assert (folder / "config.json").read_bytes() == old["config.json"]
    assert all(commit in path for _, path, _ in hub.requests if "/resolve/" in path)
    assert [(model.name, model.revision) for model in installed()] == [("org/tiny@refs/pr/1", "refs/pr/1")]


def test_a_repository_of_the_catalog_is_stored_under_its_catalog_name(hub: FakeHub, cache: Path) -> None:
    hub.add("microsoft/Phi-3-mini-4k-instruct", MODEL)
    assert pull("microsoft/phi-3-mini-4k-instruct") == cache / "phi-3-mini-4k-instruct"
    assert resolve("phi-3-mini-4k-instruct") == cache / "phi-3-mini-4k-instruct"


def test_the_catalogs_revision_is_fetched_by_its_commit(hub: FakeHub, cache: Path) -> None:
    entry = find_entry("phi-3-mini-128k-instruct", "april-2024")
    hub.add(entry.source.repo, MODEL, revision=entry.source.revision)
    assert pull("phi-3-mini-128k-instruct@april-2024") == cache / "phi-3-mini-128k-instruct@april-2024"
    assert hub.requests[0][1].endswith("/revision/bb5bf1e4001277a606e11debca0ef80323e5f824")


def test_a_broken_connection_is_taken_up_at_the_last_byte(hub: FakeHub) -> None:
    hub.add("org/tiny", MODEL)
    hub.sent_before_break[SHARD] = [400_000, 300_000]
    folder = pull("org/tiny")
    assert (folder / SHARD).read_bytes() == WEIGHTS
    first, *later = hub.ranges(SHARD)
    starts = [int(value.removeprefix("bytes=").rstrip("-")) for value in later]
    assert first is None
    assert len(starts) == 2
    assert 0 < starts[0] <= 400_000
    assert starts[0] < starts[1] <= 700_000


def test_an_interrupted_pull_is_resumed_by_the_next_one(hub: FakeHub, cache: Path) -> None:
    hub.add("org/tiny", MODEL)
    hub.sent_before_break[SHARD] = [500_000] + [0] * 20
    message = pull_error("org/tiny")
    assert SHARD in message
    assert "run the same pull again" in message
    assert not (cache / "org--tiny").exists()
    with pytest.raises(DownloadError, match="miniphi pull org/tiny"):
        resolve("org/tiny")
    assert installed() == []
    left = {name.removeprefix("org--tiny.incomplete/") for name in names_under(cache) if SHARD in name}
    (partial,) = left
    assert partial.endswith(".incomplete")
    have = (cache / "org--tiny.incomplete" / partial).stat().st_size
    assert 0 < have <= 500_000

    hub.sent_before_break.clear()
    hub.requests.clear()
    folder = pull("org/tiny")
    assert hub.ranges(SHARD) == [f"bytes={have}-"]
    assert hub.ranges("config.json") == []
    assert (folder / SHARD).read_bytes() == WEIGHTS
    assert names_under(folder) == TAKEN | {"miniphi.json"}


def test_ctrl_c_leaves_only_what_a_resume_needs(hub: FakeHub, cache: Path) -> None:
    hub.add("org/tiny", MODEL)

    def stop_half_way(name: str, done: int, total: int) -> None:
        if name == SHARD and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("org/tiny", progress=stop_half_way)
    assert not (cache / "org--tiny").exists()
    hub.requests.clear()
    assert (pull("org/tiny") / SHARD).read_bytes() == WEIGHTS
    (resumed,) = hub.ranges(SHARD)
    assert resumed is not None


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_a_corrupted_file_is_refused_and_deleted(hub: FakeHub, cache: Path, name: str) -> None:
    hub.add("org/tiny", MODEL)
    good = MODEL[name]
    hub.served_instead[name] = good[:-1] + bytes([good[-1] ^ 1])
    message = pull_error("org/tiny")
    assert f"{name} arrived corrupted" in message
    assert hashlib.sha256(hub.served_instead[name]).hexdigest() in message
    assert not any(name in left for left in names_under(cache))
    hub.served_instead.clear()
    assert (pull("org/tiny") / name).read_bytes() == good


def test_a_server_that_sends_too_much_is_refused(hub: FakeHub) -> None:
    hub.add("org/tiny", MODEL)
    hub.served_instead[SHARD] = WEIGHTS + b"more"
    assert f"more than the {len(WEIGHTS):,} bytes of {SHARD}" in pull_error("org/tiny")


def test_a_server_without_ranges_starts_the_file_again(hub: FakeHub) -> None:
    hub.add("org/tiny", MODEL)
    hub.ignores_range = True
    hub.sent_before_break[SHARD] = [400_000]
    assert (pull("org/tiny") / SHARD).read_bytes() == WEIGHTS
    assert len(hub.ranges(SHARD)) == 2


def test_a_partial_file_of_another_commit_is_not_continued(hub: FakeHub, cache: Path) -> None:
    hub.add("org/tiny", MODEL)
    hub.sent_before_break[SHARD] = [500_000] + [0] * 20
    pull_error("org/tiny")
    hub.sent_before_break.clear()
    changed = {**MODEL, SHARD: WEIGHTS[1:] + b"!"}
    hub.add("org/tiny", changed)
    hub.requests.clear()
    assert (pull("org/tiny") / SHARD).read_bytes() == changed[SHARD]
    assert hub.ranges(SHARD) == [None]
    assert not any(name.endswith(".incomplete") for name in names_under(cache))


def test_a_busy_hub_is_asked_again(hub: FakeHub) -> None:
    hub.add("org/tiny", MODEL)
    hub.file_statuses = [503, 429]
    assert (pull("org/tiny") / "config.json").read_bytes() == MODEL["config.json"]


def test_the_token_goes_to_the_hub_and_not_to_the_host_it_redirects_to(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/tiny", MODEL)
    hub.gated.add("org/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    pull("org/tiny")
    sent = {path.split("/")[1] == "cdn": headers.get("authorization") for _, path, headers in hub.requests}
    assert sent == {False: "Bearer hf_" + "x" * 34, True: None}


def test_no_telemetry_is_sent(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    hub.add("org/tiny", MODEL)
    pull("org/tiny")
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert {headers["user-agent"] for _, _, headers in hub.requests} == {"miniphi"}
    assert not any("telemetry" in path for _, path, _ in hub.requests)


def test_unknown_gated_and_private_models_say_what_to_do(hub: FakeHub) -> None:
    hub.add("org/tiny", MODEL)
    assert "no model 'org/none'" in pull_error("org/none")
    message = pull_error("org/tiny", revision="v9")
    assert "no revision 'v9'" in message
    hub.gated.add("org/tiny")
    assert "org/tiny is gated" in pull_error("org/tiny")
    hub.info_status = 401
    assert "HF_TOKEN" in pull_error("org/tiny")
    hub.info_status = 403
    assert "HTTP status 403" in pull_error("org/tiny")
    hub.info_status = 404
    assert "HTTP status 404: check the name, and HF_ENDPOINT" in pull_error("org/tiny")
    hub.info_status = 500
    assert "HTTP status 500: try again later" in pull_error("org/tiny")


@pytest.mark.parametrize("body", [b"<html>a login page</html>", b"[1, 2]", b'{"x": 1}'])
def test_something_that_is_no_hub_is_an_error(hub: FakeHub, body: bytes) -> None:
    hub.info_body = body
    message = pull_error("org/tiny")
    assert "HF_ENDPOINT" in message or "which commit" in message


def test_no_network_fails_in_seconds(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        started = time.monotonic()
        message = pull_error("org/tiny")
    assert time.monotonic() - started < 5
    assert list(cache.iterdir()) == [cache / ".locks"]
    assert "no connection to the hub for org/tiny@main" in message
    assert "check the network" in message


def test_a_silent_server_runs_into_the_timeout(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        started = time.monotonic()
        assert "no connection to the hub" in pull_error("org/tiny")
    assert 0.9 < time.monotonic() - started < 5


def test_the_librarys_offline_switch_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in pull_error("org/tiny")


def test_a_full_disk_is_met_before_the_first_byte(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/tiny", MODEL)
    usage = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = pull_error("org/tiny")
    assert "1.00 MiB free" in message
    assert "needs 1.95 MiB" in message
    assert hub.ranges(SHARD) == []


def test_a_disk_that_fills_up_on_the_way_is_named(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from miniphi.models import hub as hub_module

    def fail(file: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hub.add("org/tiny", MODEL)
    monkeypatch.setattr(hub_module, "finish_file", fail)
    message = pull_error("org/tiny")
    assert "free and the model needs" in message
    assert "MINIPHI_HOME" in message
    assert not (cache / "org--tiny").exists()


def test_the_only_gguf_is_taken_and_one_of_many_must_be_named(hub: FakeHub, cache: Path) -> None:
    hub.add("org/one", {"README.md": b"", "tiny-q4.gguf": WEIGHTS})
    assert pull("org/one") == cache / "org--one" / "tiny-q4.gguf"
    hub.add("org/many", {"a-q4.gguf": WEIGHTS, "sub/b-q8.gguf": WEIGHTS[::-1]})
    message = pull_error("org/many")
    assert "a-q4.gguf, sub/b-q8.gguf" in message
    chosen = pull("org/many/sub/b-q8.gguf")
    assert chosen == cache / "org--many--sub--b-q8.gguf" / "b-q8.gguf"
    assert chosen.read_bytes() == WEIGHTS[::-1]
    assert resolve("org/many/sub/b-q8.gguf") == chosen
    assert "no file 'c.gguf'" in pull_error("org/many/c.gguf")


def test_pickled_weights_are_refused(hub: FakeHub) -> None:
    hub.add("org/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    assert "only pickled weights" in pull_error("org/old")


def test_remove_takes_a_model_and_what_is_left_of_a_pull(hub: FakeHub, cache: Path) -> None:
    hub.add("org/tiny", MODEL)
    hub.sent_before_break[SHARD] = [500_000] + [0] * 20
    pull_error("org/tiny")
    remove("org/tiny")
    assert names_under(cache) == {".locks/org--tiny.lock"}
    hub.sent_before_break.clear()
    pull("org/tiny")
    remove("org/tiny")
    assert installed() == []
    with pytest.raises(DownloadError, match=r"'org/tiny' is not in the cache; installed models: none"):
        remove("org/tiny")


def test_a_url_is_answered_with_the_hub_id(hub: FakeHub) -> None:
    with pytest.raises(InvalidRequestError, match=r"give the hub id, such as 'org/tiny'"):
        pull("http://hub.example/org/tiny/tree/main")


def test_two_pulls_of_one_model_do_not_meet(hub: FakeHub) -> None:
    hub.add("org/tiny", MODEL)
    messages = []

    def pull_again(name: str, done: int, total: int) -> None:
        if not messages:
            messages.append(pull_error("org/tiny"))

    pull("org/tiny", progress=pull_again)
    assert messages == ["another process is pulling or removing org/tiny; wait for it, then try again"]
