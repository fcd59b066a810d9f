"""The work of a chat template, counted while it renders.

Counted are characters that are written or named, and steps of loops. What pads, joins or replaces
counts by the length that it will have, before it is made. A container counts, where it is made, by
all that it holds: one that holds another twice is written out twice. Nothing that may be long is
worked out while a template is compiled, where Jinja would apply filters to constants. Not counted:
what a sum makes of its own arguments.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from roll_sft.data.chat.template_limits import STEP, Budget, OverBudgetError

_ENTRY = 2048  # characters that the start of a macro, or of a loop within itself, counts for
_ITEM = 16  # characters that an entry of a container counts for
_CONTAINERS = (list, tuple, dict, Namespace)
_BLOCKS = 256  # pieces of output that are counted at once
# Widths in `'%9d' % x` and in `'{:9}'.format(x)`, and a width that is one of the values.
_WIDTH = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\d*)\.?(\d*)|:[^{}:]*?(\d+)(?:\.(\d+))?[^{}:]*\}")
_GIVEN_WIDTH = re.compile(r"%[^A-Za-z%]*\*|:[^{}]*\{")
# Names that no template has.
_LOOPED, _NAMED, _ENTERED = "roll_sft_looped", "roll_sft_named", "roll_sft_entered"
_BUILT = "roll_sft_built"


def counted(tree: nodes.Template, environment: Any, budget: Budget) -> Any:
    """Return `tree` with counters put in; `environment` is changed so that it spends `budget`."""
    environment.concat = _concat(budget)
    environment.globals.pop("lipsum")  # as much text as it is asked for, and no template asks
    _count_products(environment, budget)
    _count_texts(environment, budget)
    environment.filters |= _counters(budget)
    return _Counted().visit(tree)


def _count_products(environment: Any, budget: Budget) -> None:
    """Ranges, and texts and numbers that are multiplied."""

    def bounded_range(*bounds: int) -> range:
        numbers = safe_range(*bounds)
        budget.spend(STEP * len(numbers))
        return numbers

    def multiply(left: Any, right: Any) -> Any:
        for many, number in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(number, int):
                budget.spend(_weight(many) * max(number, 0))
        return left * right

    def power(base: Any, exponent: Any) -> Any:
        if isinstance(base, int) and isinstance(exponent, int):
            budget.spend(base.bit_length() * max(exponent, 0))
        return base**exponent

    environment.globals["range"] = bounded_range
    environment.intercepted_binops |= {"*", "**"}
    environment.binop_table |= {"*": multiply, "**": power}


def _count_texts(environment: Any, budget: Budget) -> None:
    """Texts that methods, filters and formats make longer."""

    def remainder(left: Any, right: Any) -> Any:
        if isinstance(left, str):
            budget.spend(_formatted(left, right if isinstance(right, tuple) else (right,)))
        return left % right

    call = environment.call

    def bounded_call(context: Any, called: Any, *values: Any, **named: Any) -> Any:
        text = getattr(getattr(called, "__wrapped__", called), "__self__", None)
        if not isinstance(text, str):
            made = call(context, called, *values, **named)
            if not isinstance(made, str):  # of a macro, which has counted what it wrote
                budget.spend(_weight(made))
            return made
        name, given = getattr(called, "__name__", ""), (*values, *named.values())
        # `text.join(parts)` is `parts | join(text)`.
        budget.spend(_asked(name, given[0], (text,)) if name == "join" and given
                     else _asked(name, text, given))  # fmt: skip
        made = call(context, called, *values, **named)
        budget.spend(_size(made))
        return made

    def bounded_filter(name: str, apply: Any) -> Callable[..., Any]:
        passed = getattr(apply, "jinja_pass_arg", None)

        @jinja2.pass_context  # so that no constant is filtered while the template is compiled
        def bounded(context: Any, value: Any, *values: Any, **named: Any) -> Any:
            budget.spend(_asked(name, value, (*values, *named.values())))
            leading = () if passed is None else (_PASSED[passed.name](context),)
            made = apply(*leading, value, *values, **named)
            budget.spend(_weight(made))
            return made

        return bounded

    environment.call = bounded_call
    environment.filters = {
        name: bounded_filter(name, apply) for name, apply in environment.filters.items()
    }
    environment.intercepted_binops |= {"%"}
    environment.binop_table |= {"%": remainder}


# What a filter may ask to be given first.
_PASSED: Mapping[str, Callable[[Any], Any]] = {
    "context": lambda context: context,
    "eval_context": lambda context: context.eval_ctx,
    "environment": lambda context: context.environment,
}


def _asked(name: str, value: Any, given: tuple[Any, ...]) -> int:
    """The characters that a filter or a method asks for beyond those of `value`."""
    match name:
        case "center" | "ljust" | "rjust" | "zfill":
            return _numbers(given)
        case "batch" | "slice":
            return _ITEM * _numbers(given)
        case "tojson":
            return _numbers(given) * (_weight(value) // _ITEM + 1)
        case "format" | "format_map":
            return _formatted(str(value), given)
        case "indent":
            return (str(value).count("\n") + 1) * (_numbers(given) + sum(map(_size, given)))
        case "expandtabs":
            return str(value).count("\t") * _numbers(given)
        case "replace" if len(given) >= 2:
            return str(value).count(str(given[0])) * len(str(given[1]))
        case "join" if given and hasattr(value, "__len__"):
            return len(value) * _size(given[0])
    return 0


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


def _counters(budget: Budget) -> dict[str, Any]:
    """The filters that `_Counted` puts into a template."""

    @jinja2.pass_context  # each, so that it is done at every rendering and not at compilation
    def looped(_context: Any, values: Any) -> Any:
        if isinstance(values, Iterator):
            values = list(values)
        try:
            number = len(values)
        except TypeError:  # no collection: the loop raises its own error
            return values
        budget.spend(STEP * number)
        return values

    @jinja2.pass_context
    def named(_context: Any, value: Any) -> Any:
        budget.spend(_size(value))
        return value

    @jinja2.pass_context
    def built(_context: Any, value: Any) -> Any:
        budget.spend(_weight(value))
        return value

    @jinja2.pass_context
    def entered(_context: Any, value: str) -> str:
        budget.spend(_ENTRY)
        return value

    return {_LOOPED: looped, _NAMED: named, _BUILT: built, _ENTERED: entered}


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


def _weight(value: Any, known: dict[int, int] | None = None) -> int:
    """The size of `value` with all that it holds, as often as it holds it.

    `known`: id of a container -> its weight, so that one that is held twice is walked through once.
    """
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    if isinstance(value, dict):
        held = [*value, *value.values()]
    elif isinstance(value, list | tuple):
        held = [*value]
    else:
        return 0
    known = {} if known is None else known
    if id(value) not in known:
        known[id(value)] = 0  # one that holds itself is written out once
        weight = _ITEM * len(held) + sum([len(each) for each in held if isinstance(each, str)])
        inner = [each for each in held if isinstance(each, _CONTAINERS)]
        known[id(value)] = weight + sum(_weight(each, known) for each in inner)
    return known[id(value)]


class _Counted(NodeTransformer):
    """Has the steps of loops and macros, what is given a name, and containers counted."""

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

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body = [_entry(node), *node.body]
        return node

    def visit_Block(self, node: nodes.Block) -> nodes.Node:  # noqa: N802 -- `self.name()` calls it
        self.generic_visit(node)
        node.body = [_entry(node), *node.body]
        return node

    def visit_With(self, node: nodes.With) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.values = [_filtered(value, _NAMED) for value in node.values]
        return node

    def visit_List(self, node: nodes.List) -> Any:  # noqa: N802
        return self._container(node)

    def visit_Dict(self, node: nodes.Dict) -> Any:  # noqa: N802
        return self._container(node)

    def visit_Tuple(self, node: nodes.Tuple) -> Any:  # noqa: N802
        return self._container(node) if node.ctx == "load" else node

    def visit_Add(self, node: nodes.Add) -> Any:  # noqa: N802
        self.generic_visit(node)  # the sum with a constant text is a text
        is_text = any(isinstance(each, nodes.Const) for each in (node.left, node.right))
        return node if is_text else _filtered(node, _BUILT)

    def _container(self, node: Any) -> Any:
        self.generic_visit(node)
        return _filtered(node, _BUILT) if any(map(_is_made, node.items)) else node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.node, nodes.Const):
            node.node = _filtered(node.node, _NAMED)
        return node


def _is_made(entry: nodes.Node) -> bool:
    values = (entry.key, entry.value) if isinstance(entry, nodes.Pair) else (entry,)
    return not all(isinstance(value, nodes.Const) for value in values)


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
