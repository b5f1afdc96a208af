"""`miniphi models`: the known models and those on this machine."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from miniphi.cli.terminal import print_table

if TYPE_CHECKING:
    from miniphi.models import InstalledModel

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print the lists as JSON")
    parser.add_argument(
        "--remove-packed-copies",
        action="store_true",
        help="delete the copies that make starts fast, then print the lists; the next use of a model makes its anew",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from miniphi.models import (
        catalog,
        find_entry,
        format_bytes,
        installed,
        packed_copy_bytes,
        packed_copy_dir,
        remove_packed_copies,
    )

    if args.remove_packed_copies:
        remove_packed_copies()
    here = {model.name: model for model in installed()}
    bare = [find_entry(name) for name in catalog()]
    entries = [each for entry in bare for each in (entry, *(find_entry(entry.name, rev) for rev in entry.revisions))]
    others = [model for name, model in here.items() if name not in {entry.key for entry in entries}]
    if args.json:
        known = [
            {
                "name": entry.key,
                "parameters": entry.parameters,
                "context_tokens": entry.context_tokens,
                "licence": entry.licence,
                "source": str(entry.source),
                "installed": _installed(here.get(entry.key)),
            }
            for entry in entries
        ]
        copies = {"path": str(packed_copy_dir()), "bytes": packed_copy_bytes()}
        others_here = [_installed(model) for model in others]
        print(json.dumps({"catalog": known, "others": others_here, "packed_copies": copies}, indent=2))
        return 0
    rows = [
        [
            entry.key,
            f"{entry.parameters / 1e9:.2f} B",
            f"{entry.context_tokens:,}",
            entry.licence,
            _where(here.get(entry.key)),
        ]
        for entry in entries
    ]
    rows += [[model.name, "", "", "", _where(model)] for model in others]
    print_table(["NAME", "PARAMETERS", "CONTEXT", "LICENCE", "ON THIS MACHINE"], rows)
    if num_bytes := packed_copy_bytes():
        print(
            f"\nPacked copies for fast starts take {format_bytes(num_bytes)} in {packed_copy_dir()}; "
            "--remove-packed-copies deletes them."
        )
    return 0


def _installed(model: "InstalledModel | None") -> dict[str, Any] | None:
    if model is None:
        return None
    return {
        "name": model.name,
        "path": str(model.path),
        "bytes": model.bytes,
        "source": model.source,
        "revision": model.revision,
    }


def _where(model: "InstalledModel | None") -> str:
    from miniphi.models import format_bytes

    return "-" if model is None else format_bytes(model.bytes)
