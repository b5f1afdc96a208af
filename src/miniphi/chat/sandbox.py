"""Jinja in a sandbox, as chat templates of Hugging Face expect it.

Templates come with model files, so they are not trusted: no attribute of Python's internals, no mutation of what they
are given, and bounds on loops over `range`, on products and sums of texts and lists, and on the output. Loops nested
over the messages themselves are not bounded, because Jinja has no hook for that.
"""

import json
import re
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from miniphi.errors import ChatTemplateError

# Noncharacters around what `{% generation %}` encloses; callers hide them in the text that they hand in.
GENERATION_START, GENERATION_STOP = "\ufdd0", "\ufdd1"

_MAX_RANGE = 100_000  # loop steps over range() in one rendering
_MAX_VALUE = 1 << 24  # characters or items of one product or sum
_MAX_OVERHEAD = 1 << 20  # characters that a template may write beyond a multiple of what it was given
_MAX_GROWTH = 8


class TemplateProgram:
    """A compiled template and what can be learnt by reading it."""

    def __init__(self, source: str) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        del environment.globals["lipsum"]
        try:
            tree = environment.parse(source)
            constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
            self.words = frozenset(constants | {node.attr for node in tree.find_all(nodes.Getattr)})
            self.variables = frozenset(find_undeclared_variables(tree))
            self.marks_generation = any(node.data == GENERATION_START for node in tree.find_all(nodes.TemplateData))
            self._template = environment.from_string(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from None
        self.source = source

    def run(self, input_size: int, **variables: Any) -> str:
        """Render; `input_size` is the number of characters given. Raises: ChatTemplateError with its message."""
        budget, written = _RangeBudget(), 0
        parts: list[str] = []
        try:
            for part in self._template.generate(range=budget.range, **variables):
                parts.append(part)
                written += len(part)
                if written > _MAX_OVERHEAD + _MAX_GROWTH * input_size:
                    raise SecurityError(f"it wrote more than {written} characters for a conversation of {input_size}")
        except Exception as error:  # a template can raise whatever Python can
            raise ChatTemplateError(f"the chat template failed: {error}") from None
        return "".join(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (_is_small(left) and _is_small(right)):
            raise SecurityError(f"{left!r} ** {right!r} is too large")
        if operator == "*" and _repeated_length(left, right) + _repeated_length(right, left) > _MAX_VALUE:
            raise SecurityError("a product is too large")
        if operator == "+" and _length(left) + _length(right) > _MAX_VALUE:
            raise SecurityError("a sum is too large")
        return super().call_binop(context, operator, left, right)


class _RangeBudget:
    def __init__(self) -> None:
        self._left = _MAX_RANGE

    def range(self, *bounds: int) -> range:
        steps = range(*bounds)
        self._left -= len(steps)
        if self._left < 0:
            raise SecurityError(f"it loops more than {_MAX_RANGE} times over range()")
        return steps


class _Generation(Extension):
    """`{% generation %}`: what it encloses is what the model writes, so what training learns."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as a set

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, stop = (
            nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (GENERATION_START, GENERATION_STOP)
        )
        return nodes.Scope([start, *body, stop], lineno=line)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _repeated_length(value: Any, times: Any) -> int:
    return _length(value) * times if isinstance(times, int) else 0


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= 64


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers does: without the HTML escapes of Jinja's own filter."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # Hidden characters are private-use and must survive.
    return re.sub("[\x7f-\U000effff]", lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def generation_spans(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the generation marks out of a rendered text; return it and the spans that they enclosed."""
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    plain: list[str] = []
    size = 0
    for part in re.split(f"([{GENERATION_START}{GENERATION_STOP}])", text):
        if part == GENERATION_START:
            starts.append(size)
        elif part == GENERATION_STOP:
            spans.append((starts.pop() if starts else 0, size))
        else:
            plain.append(part)
            size += len(part)
    return "".join(plain), spans
