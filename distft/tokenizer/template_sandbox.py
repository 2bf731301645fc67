"""Runs Jinja templates that nobody vouches for: in Jinja's sandbox, and with bounds on time and memory.

A template gets what transformers gives to chat templates: `raise_exception`, a `tojson` that escapes no HTML,
`break` and `continue`, and `{% generation %}`, whose places in the text are reported. The sandbox keeps it
from Python's objects, but would let it loop for ever or fill the memory in many ways.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any

import jinja2
from jinja2 import nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 1 << 24  # of a rendered text, and of each text on the way to it
MAX_STEPS = 1 << 18  # rounds of loops, calls, and 256 characters made, each; takes a second or two
_MAX_ITEMS = 1 << 16  # of a list made of lists; also a width and an indentation
_MAX_BITS = 1 << 12  # of a product or a power
_TOO_WIDE = f"it formats a text with a width of more than {_MAX_ITEMS:,}"
_CHARACTERS_PER_STEP = 256
# Jinja's own that no chat template uses: one is random, others make long texts of short ones.
_UNUSED_FUNCTIONS = ("lipsum", "cycler", "joiner")
_UNUSED_FILTERS = ("random", "urlize", "wordwrap", "xmlattr", "pprint")
_WITH_WIDTH = {  # methods of texts and Jinja's functions of filters
    "center", "expandtabs", "ljust", "rjust", "zfill",
    "do_batch", "do_center", "do_indent", "do_slice", "do_truncate", "_to_json",
}  # fmt: skip
_WIDE_PRINTF = re.compile(r"%[^%a-zA-Z]*(\d{5}|\*)")
_WIDE_FORMAT = re.compile(r"\{[^{}]*(\d{5}|\{)")  # a width, or one that is an argument

Spans = list[tuple[int, int]]


class Renderer:
    """One template, compiled; for one thread at a time. Raises `jinja2.TemplateError` if it is none."""

    def __init__(self, source: str, today: date | None = None) -> None:
        """`today`: what `strftime_now` formats; without it the template has no such function."""
        self._environment = _BoundedEnvironment(today)
        code = self._environment.compile(_Bounding().visit(self._environment.parse(source)))
        self._template = jinja2.Template.from_code(self._environment, code, dict(self._environment.globals))

    def render(self, variables: Mapping[str, Any]) -> tuple[str, Spans]:
        """The text, and [start, stop) of each part of it that `{% generation %}` surrounds.

        `variables` are plain JSON. Raises `jinja2.TemplateError`, and what the template makes Python raise.
        """
        environment = self._environment
        environment.num_steps, environment.num_characters = 0, 0
        environment.generated = []
        blocks: list[str] = []
        for block in self._template.generate(dict(variables)):
            blocks.append(block)
            environment.num_characters += len(block)
            environment.check_length(environment.num_characters)
        text = "".join(blocks)
        for start, part in environment.generated:
            if not text.startswith(part, start):
                raise jinja2.TemplateError(
                    "generation stands in a macro or a set block, so that its place in the text is unknown"
                )
        return text, [(start, start + len(part)) for start, part in environment.generated]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the part of the text that the model writes."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _generated(self, _: nodes.EvalContext, caller: Callable[[], str]) -> str:
        text = caller()
        assert isinstance(self.environment, _BoundedEnvironment)
        self.environment.generated.append((self.environment.num_characters, text))
        return text


class _Namespace(Namespace):
    """Jinja's, without names of Python's own attributes, with which a template could pose as another type."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no {name!r}: a name must not begin with an underscore")


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, where what a template computes has bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, today: date | None) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # else constants are computed where nothing counts
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.num_steps = 0
        self.num_characters = 0  # rendered so far
        self.generated: list[tuple[int, str]] = []
        self.filters = {
            name: self._bounded(_to_json if name == "tojson" else function)
            for name, function in self.filters.items()
            if name not in _UNUSED_FILTERS
        }
        for name in _UNUSED_FUNCTIONS:
            del self.globals[name]
        functions: dict[str, Any] = {
            "range": self._range,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
        }
        if today is not None:
            functions["strftime_now"] = today.strftime
        self.globals.update(functions)

    def take_steps(self, number: int = 1) -> str:
        self.num_steps += number
        if self.num_steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps: does it loop for ever?")
        return ""

    def check_length(self, num_characters: int) -> None:
        """Raise `SecurityError` for a text that is too long."""
        if num_characters > MAX_CHARACTERS:
            raise SecurityError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")

    def counted(self, value: Any) -> Any:
        """The value, whose length takes steps. Raises `SecurityError` if it is too long."""
        if type(value) is str:
            self.check_length(len(value))
            self.take_steps(len(value) // _CHARACTERS_PER_STEP)
        elif type(value) is list:
            self.take_steps(len(value))
        return value

    def joined(self, values: Sequence[Any]) -> str:
        """`a ~ b` of templates."""
        texts = [str(value) for value in values]
        self.check_length(sum(map(len, texts)))
        text: str = self.counted("".join(texts))
        return text

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self._check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * right)
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.check_length(len(left) + len(right))
        elif operator == "+" and isinstance(left, list) and isinstance(right, list):
            _check_items(len(left) + len(right))
        elif operator == "%" and isinstance(left, str) and _WIDE_PRINTF.search(left):
            raise SecurityError(_TOO_WIDE)
        return self.counted(super().call_binop(context, operator, left, right))

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        for sequence, count in ((left, right), (right, left)):
            if isinstance(count, int) and isinstance(sequence, str):
                self.check_length(len(sequence) * count)
            elif isinstance(count, int) and isinstance(sequence, list | tuple):
                _check_items(len(sequence) * count)

    def _range(self, *args: int) -> range:
        numbers = range(*args)
        if len(numbers) > MAX_RANGE:
            raise SecurityError(f"its range is longer than {MAX_RANGE:,}")
        self.take_steps(len(numbers))
        return numbers

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        subject = getattr(function, "__self__", None)
        if isinstance(subject, str):
            self._check_arguments(getattr(function, "__name__", ""), subject, args, kwargs)
        elif getattr(function, "__name__", "") in {"format", "format_map"}:  # the sandbox's own wrapper
            wrapped = getattr(function, "__wrapped__", None)
            self._check_arguments("format", getattr(wrapped, "__self__", ""), args, kwargs)
        result = super().call(context, function, *args, **kwargs)
        return self.counted(result)

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments and result are checked; it keeps what Jinja passes to it first."""

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            subject = next((value for value in args if isinstance(value, str)), "")
            self._check_arguments(function.__name__, subject, args, kwargs)
            return self.counted(function(*args, **kwargs))

        return bounded

    def _check_arguments(
        self, name: str, subject: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Of a text's method or a filter: before it makes a long text of short ones."""
        values = [*args, *kwargs.values()]
        if "replace" in name:
            texts = [value for value in values if isinstance(value, str)][-2:]
            count = subject.count(texts[0]) if len(texts) == 2 else 0
            self.check_length(len(subject) + count * len(texts[-1] if texts else ""))
        elif "join" in name:
            joined = [value for value in values if isinstance(value, list | tuple | str)]
            sizes = [len(part) + len(subject) for parts in joined for part in parts if isinstance(part, str)]
            self.check_length(sum(sizes))
        elif "format" in name:
            pattern = _WIDE_PRINTF if name == "do_format" else _WIDE_FORMAT
            if pattern.search(subject):
                raise SecurityError(_TOO_WIDE)
        if name in _WITH_WIDTH:
            widths = values[name == _to_json.__name__ :]  # whose first argument is any number
            if any(isinstance(width, int) and width > _MAX_ITEMS for width in widths):
                raise SecurityError(_TOO_WIDE)


def _check_items(num_items: int) -> None:
    if num_items > _MAX_ITEMS:
        raise SecurityError(f"it makes a list of more than {_MAX_ITEMS:,} items")


def _check_bits(num_bits: int) -> None:
    if num_bits > _MAX_BITS:
        raise SecurityError(f"it makes a number of more than {_MAX_BITS:,} bits")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Bounding(NodeTransformer):
    """Lets each round of a loop and each call of a macro count, and bounds `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _environment_call("joined", nodes.List(node.nodes)).set_lineno(node.lineno)

    def _counted(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.ExprStmt(_environment_call("take_steps"))
        node.body.insert(0, step.set_lineno(node.lineno))
        return node


def _environment_call(name: str, *arguments: nodes.Expr) -> nodes.Node:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)
