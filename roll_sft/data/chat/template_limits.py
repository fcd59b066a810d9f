"""Chat templates, compiled so that no rendering runs for ever or fills the memory.

A template comes with a model and may be hostile. transformers renders it in Jinja's sandbox, which
denies it files and the internals of Python, but not nested loops or texts that double. A template
that walks through the conversation once is harmless and is compiled as it is. In any other
`template_budget` counts the work. A count is the same on every machine, unlike a time limit.

Promise: the text equals that of transformers, or `OverBudgetError` is raised.
"""

from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from transformers.utils import chat_template_utils

# Characters. A conversation of a million tokens has about 4 million, which a template may write and
# name several times over.
BUDGET = 2**27
STEP = 256  # characters that a step of a loop counts for
# Filters whose result is hardly longer than their input.
_SHORT_FILTERS = frozenset(
    ("trim", "length", "count", "default", "d", "first", "last", "upper", "lower", "capitalize",
     "title", "string", "int", "list", "selectattr", "rejectattr", "tojson")
)  # fmt: skip

# Statements and operators whose text may be built upon itself.
_BUILDERS = (
    nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With, nodes.Block, nodes.AssignBlock,
    nodes.Mul, nodes.Pow,
)  # fmt: skip


class OverBudgetError(Exception):
    """A template does more than any conversation needs."""

    def __init__(self) -> None:
        super().__init__(
            f"for one conversation it writes more than {BUDGET:,} characters, or takes more than "
            f"{BUDGET // STEP:,} steps of loops"
        )


class Budget:
    """The characters that a rendering may still spend; call `renew` before each rendering."""

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

    from roll_sft.data.chat.template_budget import counted

    return environment.from_string(counted(parsed, environment, budget)), budget


def _is_linear(tree: nodes.Template) -> bool:
    """Whether a template walks through its input once, so that its work is bounded.

    It has no loop in a loop, builds no value from itself, and calls nothing but the generation
    marks and `raise_exception`.
    """
    loops = list(tree.find_all(nodes.For))
    heavy = (nodes.For, nodes.Assign, nodes.AssignBlock)
    building = (nodes.Add, nodes.Concat, nodes.Filter, nodes.List, nodes.Tuple, nodes.Dict)
    calls = (call.node for call in tree.find_all(nodes.Call))
    return (
        not any(loop.recursive or _has(loop, heavy) for loop in loops)
        and not _has(tree, _BUILDERS)
        and not any(_has(assign, building) for assign in tree.find_all(nodes.Assign))
        and all(_is_of_loop(each.left) for each in tree.find_all(nodes.Mod))
        and all(
            each.name in _SHORT_FILTERS
            and not _has(each, nodes.Filter)
            and not (each.name == "tojson" and (each.args or each.kwargs))  # an indent
            for each in tree.find_all(nodes.Filter)
        )
        and all(
            isinstance(called, nodes.ExtensionAttribute)
            or (isinstance(called, nodes.Name) and called.name == "raise_exception")
            for called in calls
        )
    )


def _has(node: nodes.Node, kinds: type[nodes.Node] | tuple[type[nodes.Node], ...]) -> bool:
    return any(True for _ in node.find_all(kinds))


def _is_of_loop(value: nodes.Node) -> bool:
    """Whether `value` is a number such as `loop.index0`, so that a remainder of it is no format."""
    return isinstance(value, nodes.Getattr) and getattr(value.node, "name", None) == "loop"


class GenerationMarks(Extension):
    """Reads `{% generation %}` blocks as their content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def has_marks(template: str) -> bool:
    """Whether the template says with `{% generation %}` what is trained on."""
    return any(
        kind == "name" and value == "generation"
        for _, kind, value in jinja2.Environment(extensions=[GenerationMarks, loopcontrols]).lex(
            template
        )
    )
