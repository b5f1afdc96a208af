"""`miniphi show`: a model's card from the catalog, or what the files of any other model say."""

import argparse
import json
from collections import Counter
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from miniphi.cli.options import DEFAULT_MODEL

if TYPE_CHECKING:
    from miniphi.models import BenchmarkTable, CatalogEntry

__all__ = ["add_arguments", "run"]

_WIDTH = 100
_LABEL = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="a model's name or path (default: %(default)s)"
    )
    parser.add_argument("--revision", metavar="REV", help="which revision of the model, as in NAME@REV")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from miniphi.models import catalog, find_entry, resolve

    if args.model.partition("@")[0] in catalog():
        entry = find_entry(args.model, args.revision)
        if args.json:
            print(json.dumps(entry.to_dict(), indent=2, ensure_ascii=False))
        else:
            _print_card(entry)
        return 0
    facts = _read_facts(resolve(args.model, revision=args.revision))
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print_facts(facts)
    return 0


def _print_card(entry: "CatalogEntry") -> None:
    print(f"{entry.title} ({entry.key})\n")
    _field("publisher", entry.publisher)
    _field("licence", entry.licence)
    _field("architecture", entry.architecture)
    _field("parameters", f"{entry.parameters:,}")
    _field("context", f"{entry.context_tokens:,} tokens")
    _field("longest answer", f"{entry.max_output_tokens:,} tokens")
    _field("languages", ", ".join(entry.languages))
    _field("training", entry.training)
    _field("knowledge until", entry.knowledge_cutoff)
    _field("stop ids", ", ".join(map(str, entry.stop_token_ids)))
    _field("template", entry.template)
    _field("revisions", ", ".join(entry.revisions))
    _field("source", str(entry.source))
    _field("installed", _installed_at(entry.key))
    _section("Intended use", entry.intended_use)
    _section("Limits", entry.limits)
    for table in entry.tables:
        _print_table(table)
    if entry.fine_tuning is not None:
        _pairs("Fine-tuning defaults: the card", entry.fine_tuning.card)
        _pairs("Fine-tuning defaults: the pipeline, where the card is silent", entry.fine_tuning.component)
    if entry.serving:
        _pairs("Serving metadata", entry.serving)


def _installed_at(key: str) -> str:
    from miniphi.models import installed

    paths = [str(model.path) for model in installed() if model.name == key]
    return paths[0] if paths else f"no; `miniphi pull {key}` fetches it"


def _field(label: str, value: Any) -> None:
    if value in (None, "", ()):
        return
    lines = wrap(str(value), _WIDTH - _LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    print(f"{label:<{_LABEL}}{lines[0]}")
    for line in lines[1:]:
        print(" " * _LABEL + line)


def _section(title: str, items: tuple[str, ...]) -> None:
    print(f"\n{title}")
    for item in items:
        lines = wrap(item, _WIDTH - 4, break_long_words=False)
        print("  - " + "\n    ".join(lines))


def _pairs(title: str, values: Any) -> None:
    print(f"\n{title}")
    width = max(map(len, values)) + 2
    for key, value in values.items():
        lines = wrap(_plain(value), _WIDTH - width - 2, break_long_words=False, break_on_hyphens=False)
        print(f"  {key:<{width}}" + f"\n  {'':<{width}}".join(lines))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _print_table(table: "BenchmarkTable") -> None:
    """Print a table of scores; its columns are numbered, because the models' names are wider than the scores."""
    print(f"\n{table.title}")
    for number, model in enumerate(table.models, start=1):
        print(f"  [{number}] {model}")
    names = [row.name if row.shots is None else f"{row.name} ({row.shots}-shot)" for row in table.rows]
    width = max(map(len, [*names, "Average"]))
    print(" " * width + "".join(f"{f'[{number}]':>8}" for number in range(1, len(table.models) + 1)))
    group = ""
    for name, row in zip(names, table.rows, strict=True):
        if row.group != group and len({each.group for each in table.rows}) > 1:
            group = row.group
            print(f"{group}:")
        print(f"{name:<{width}}" + "".join(f"{score:>8}" for score in row.scores))
    if table.average is not None:
        print(f"{'Average':<{width}}" + "".join(f"{score:>8}" for score in table.average))


def _read_facts(path: Path) -> dict[str, Any]:
    from miniphi.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        config, scaling = checkpoint.config, checkpoint.config.rope_scaling
        formats = Counter(tensor.format.name for tensor in checkpoint.tensors.values())
        return {
            "path": str(checkpoint.path),
            "architecture": config.model_type,
            "parameters": config.num_parameters,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "vocabulary": config.vocab_size,
            "context_tokens": config.max_position_embeddings,
            "longrope_above": None if scaling is None else scaling.original_max_position_embeddings,
            "sliding_window": config.sliding_window,
            "weights": dict(formats.most_common()),
            "weights_bytes": checkpoint.num_bytes,
            "stop_ids": sorted({*config.eos_token_ids, *checkpoint.generation_eos_token_ids}),
            "has_tokenizer": checkpoint.tokenizer_source is not None,
            "template": checkpoint.chat_template,
        }


def _print_facts(facts: dict[str, Any]) -> None:
    template = facts.pop("template")
    weights = facts.pop("weights")
    for name, value in facts.items():
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _plain(value)
        _field(name.replace("_", " "), None if value is None else text)
    _field("weights", ", ".join(f"{count} x {name}" for name, count in weights.items()))
    print("\nno chat template" if template is None else f"\nChat template\n{template}")
