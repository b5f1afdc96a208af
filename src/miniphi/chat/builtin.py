"""Chat templates of known models, for files that carry none or an outdated one."""

from importlib import resources

from miniphi.errors import ChatTemplateError

# phi-3: June 2024, with system turns. phi-3-april: the first release, which drops them. phi-3-medium: the same without
# bos. phi-3.5: as June, but an empty system turn is left out. phi-4-mini: no newlines, tools in the system turn.
# chatml: ChatML and nothing else. smollm2: ChatML with a default system turn.
BUILTIN_TEMPLATES = ("chatml", "phi-3", "phi-3-april", "phi-3-medium", "phi-3.5", "phi-4-mini", "smollm2")


def builtin_template(name: str) -> str:
    """Return the Jinja source of a template in BUILTIN_TEMPLATES. Raises: ChatTemplateError for another name."""
    if name not in BUILTIN_TEMPLATES:
        raise ChatTemplateError(f"there is no chat template {name!r}; there are {', '.join(BUILTIN_TEMPLATES)}")
    return (resources.files("miniphi.chat") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
