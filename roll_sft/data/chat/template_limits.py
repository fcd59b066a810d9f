"""Chat templates compiled so that no rendering runs for ever or fills the memory.

A template comes with a model, from anybody. transformers renders it in Jinja's sandbox, which keeps
it from files and from Python's insides, but not from loops in loops or from texts that double. Here
a rendering has a budget of work: characters that are written or named, and steps of loops. It is a
count and not a clock, so a row is refused on every machine or on none.

Promised: the text is the one that transformers gives, or `OverBudgetError`. Padding counts by the
widths that it is asked for. Not counted: what a sum makes of its own arguments.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import safe_range
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

# Characters. A conversation of a million tokens has about 4 million, which a template may write and
# name several times over.
BUDGET = 2**27
_STEP = 256  # characters that a step of a loop counts for
_ENTRY = 2048  # and the beginning of a macro, or of a loop within itself
_ITEM = 8  # bytes, and characters that an entry of a list counts for
_BLOCKS = 256  # pieces of output that are counted at once
# What pads a text to a width: methods of a text, and filters.
_PADDING_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs")
_FORMAT_METHODS = ("format", "format_map")
_PADDING_FILTERS = ("center", "indent", "format")
# Widths in `'%9d' % x` and in `'{:9}'.format(x)`, and a width that is one of the values.
_WIDTH = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\d*)\.?(\d*)|:[^{}:]*?(\d+)(?:\.(\d+))?[^{}:]*\}")
_GIVEN_WIDTH = re.compile(r"%[^A-Za-z%]*\*|:[^{}]*\{")
# Names that no template has.
_LOOPED, _NAMED, _ENTERED = "roll_sft_looped", "roll_sft_named", "roll_sft_entered"


class OverBudgetError(Exception):
    """A template does more than any conversation needs."""

    def __init__(self) -> None:
        super().__init__(
            f"for one conversation it writes more than {BUDGET:,} characters, or takes more than "
            f"{BUDGET // _STEP:,} steps of loops"
        )


class Budget:
    """What is left to a rendering; `renew` before each."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = BUDGET

    def renew(self) -> None:
        """Begin another rendering."""
        self.left = BUDGET

    def spend(self, amount: int) -> None:
        """Raise `OverBudgetError` if less than `amount` is left."""
        self.left -= amount
        if self.left < 0:
            raise OverBudgetError


def compile_bounded(template: str) -> tuple[jinja2.Template, Budget]:
    """Return `template`, compiled as transformers does, and the budget of its renderings.

    Raises `jinja2.TemplateSyntaxError`, and `RecursionError` or `MemoryError` for one that is
    nested too deep.
    """
    # Not the cached function: the environment is changed below, and transformers' must not be.
    environment: Any = chat_template_utils._compile_jinja_template.__wrapped__("").environment
    budget, parsed = Budget(), environment.parse(template)
    if _is_linear(parsed):
        return environment.from_string(parsed), budget

    environment.concat = _concat(budget)
    environment.globals.pop("lipsum")  # as much text as it is asked for, and no template asks
    environment.filters |= _counters(budget)
    _count_products(environment, budget)
    _count_widths(environment, budget)
    return environment.from_string(_Counted().visit(parsed)), budget


def _count_products(environment: Any, budget: Budget) -> None:
    """Ranges, and texts and numbers that are multiplied."""

    def bounded_range(*bounds: int) -> range:
        numbers = safe_range(*bounds)
        budget.spend(_STEP * len(numbers))
        return numbers

    def multiply(left: Any, right: Any) -> Any:
        for many, number in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(number, int):
                budget.spend(_size(many) * max(number, 0))
        return left * right

    def power(base: Any, exponent: Any) -> Any:
        if isinstance(base, int) and isinstance(exponent, int):
            budget.spend(base.bit_length() * max(exponent, 0))
        return base**exponent

    environment.globals["range"] = bounded_range
    environment.intercepted_binops |= {"*", "**"}
    environment.binop_table |= {"*": multiply, "**": power}


def _count_widths(environment: Any, budget: Budget) -> None:
    """Texts that are padded, by methods, filters and formats."""

    def remainder(left: Any, right: Any) -> Any:
        if isinstance(left, str):
            budget.spend(_formatted(left, right if isinstance(right, tuple) else (right,)))
        return left % right

    call = environment.call

    def bounded_call(context: Any, called: Any, *values: Any, **named: Any) -> Any:
        name, given = getattr(called, "__name__", ""), (*values, *named.values())
        if name in _PADDING_METHODS:
            budget.spend(_numbers(given))
        elif name in _FORMAT_METHODS:
            text = getattr(getattr(called, "__wrapped__", called), "__self__", "")
            budget.spend(_formatted(str(text), given))
        return call(context, called, *values, **named)

    def padding(name: str) -> Callable[..., Any]:
        apply = environment.filters[name]

        def bounded(text: Any, *values: Any, **named: Any) -> Any:
            given = (*values, *named.values())
            budget.spend(_formatted(str(text), given) if name == "format" else _numbers(given))
            return apply(text, *values, **named)

        return bounded

    environment.call = bounded_call
    environment.filters |= {name: padding(name) for name in _PADDING_FILTERS}
    environment.intercepted_binops |= {"%"}
    environment.binop_table |= {"%": remainder}


def _concat(budget: Budget) -> Callable[[Iterable[str]], str]:
    """What joins the pieces of an output, counted."""

    def concat(blocks: Iterable[str]) -> str:
        remaining = iter(blocks)
        texts = chunk = list(islice(remaining, _BLOCKS))
        while chunk:
            budget.left -= sum(map(len, chunk))
            if budget.left < 0:
                raise OverBudgetError
            chunk = list(islice(remaining, _BLOCKS)) if len(chunk) == _BLOCKS else []
            texts += chunk
        return "".join(texts)

    return concat


def _is_linear(tree: nodes.Template) -> bool:
    """Whether a template walks through what it is given once: it cannot do too much work.

    No loop in a loop, nothing that a loop adds up, no call but of the marks and `raise_exception`.
    """
    loops = list(tree.find_all(nodes.For))
    heavy = (nodes.For, nodes.Assign, nodes.AssignBlock)
    calls = (call.node for call in tree.find_all(nodes.Call))
    return (
        not any(loop.recursive or any(True for _ in loop.find_all(heavy)) for loop in loops)
        and not any(True for _ in tree.find_all((nodes.Macro, nodes.Mul, nodes.Pow)))
        and all(_is_of_loop(each.left) for each in tree.find_all(nodes.Mod))
        and not any(each.name in _PADDING_FILTERS for each in tree.find_all(nodes.Filter))
        and all(
            isinstance(called, nodes.ExtensionAttribute)
            or (isinstance(called, nodes.Name) and called.name == "raise_exception")
            for called in calls
        )
    )


def _is_of_loop(value: nodes.Node) -> bool:
    """Whether `value` is a number such as `loop.index0`, so that a remainder of it is no format."""
    return isinstance(value, nodes.Getattr) and getattr(value.node, "name", None) == "loop"


def _counters(budget: Budget) -> dict[str, Any]:
    """The filters that `_Counted` puts into a template."""

    def looped(values: Any) -> Any:
        if isinstance(values, Iterator):
            values = list(values)
        try:
            number = len(values)
        except TypeError:  # of what is no collection, which the loop says in its own words
            return values
        budget.spend(_STEP * number)
        return values

    def named(value: Any) -> Any:
        budget.spend(_size(value))
        return value

    @jinja2.pass_context  # so that it is not done once, at compilation
    def entered(_context: Any, value: str) -> str:
        budget.spend(_ENTRY)
        return value

    return {_LOOPED: looped, _NAMED: named, _ENTERED: entered}


def _formatted(text: str, values: Iterable[Any]) -> int:
    """The characters that the widths of a format ask for."""
    widths = sum(int(width) for found in _WIDTH.findall(text) for width in found if width)
    return widths + (_numbers(values) if _GIVEN_WIDTH.search(text) else 0)


def _numbers(values: Iterable[Any]) -> int:
    return sum(abs(value) for value in values if isinstance(value, int))


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return _ITEM * len(value) if isinstance(value, list | tuple) else 0


class _Counted(NodeTransformer):
    """Has the steps of loops and macros, and what is given a name, counted."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 -- jinja2 calls it so
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _LOOPED)
        if node.recursive:
            node.body = [_entry(node), *node.body]
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        given = [_filtered(nodes.Name(each.name, "load"), _NAMED, node) for each in node.args]
        node.body = [_entry(node), *(_statement(each, node) for each in given), *node.body]
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.node, nodes.Const):
            node.node = _filtered(node.node, _NAMED)
        return node


def _filtered(value: Any, name: str, place: nodes.Node | None = None) -> Any:
    return _at(nodes.Filter(value, name, [], [], None, None), place or value)


def _entry(place: nodes.Node) -> Any:
    return _statement(_filtered(nodes.Const(""), _ENTERED, place), place)


def _statement(value: Any, place: nodes.Node) -> Any:
    return _at(nodes.ExprStmt(value), place)


def _at(node: Any, place: nodes.Node) -> Any:
    node.set_lineno(place.lineno)
    node.set_environment(place.environment)
    return node
