"""Whether a chat template writes a conversation from left to right, decided from its syntax.

A template writes in order if the text of a message depends on that message and earlier ones alone,
and the generation prompt comes last. Then the rendering of all messages begins with the rendering
of the first ones, for any messages, and no row needs a check of its own.

This holds for conversations without tool messages: a template often looks ahead to close a group of
them, in a branch of its own.

Promise: True only where this follows from the syntax. A template that writes in order may be judged
not to. Then each row is checked, which is slower and gives the same samples.
"""

from collections.abc import Sequence
from typing import TypeVar

from jinja2 import Environment, nodes
from jinja2.ext import loopcontrols

from roll_sft.data.chat.template_limits import GenerationMarks

_Kind = TypeVar("_Kind", bound=nodes.Node)
_MESSAGES = "messages"
_PROMPT = "add_generation_prompt"
# Parts that can be written elsewhere than where they stand.
_BLOCKS = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.Block, nodes.AssignBlock)
# What a loop over messages may ask about itself; `last`, `length`, `nextitem` look ahead.
_BACKWARD = ("first", "index", "index0", "previtem")


def is_written_in_order(template: str) -> bool:
    """Whether `template`, which is valid, writes in order as far as its syntax shows."""
    tree = Environment(extensions=[GenerationMarks, loopcontrols]).parse(template)
    for branch in tree.find_all(nodes.If):
        if _is_for_tools(branch.test):
            branch.body = []
    aliases = {_MESSAGES}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_messages(assign.node, aliases):
            aliases.add(assign.target.name)
    if any(name.name == _MESSAGES and name.ctx == "store" for name in tree.find_all(nodes.Name)):
        return False
    loops = [loop for loop in tree.find_all(nodes.For) if _is_messages(loop.iter, aliases)]
    # A first loop could store what lies ahead in a namespace, for a second one to read.
    if len(loops) != 1 or any(True for _ in tree.find_all(_BLOCKS)):
        return False
    allowed = {id(name) for name in _backward_uses(tree, aliases)}
    stray = any(
        name.name in aliases and name.ctx == "load" and id(name) not in allowed
        for name in tree.find_all(nodes.Name)
    )
    return not stray and _looks_back(loops[0])


def _is_for_tools(test: nodes.Node) -> bool:
    """Whether a condition is that the role of a message is "tool"."""
    if not isinstance(test, nodes.Compare) or len(test.ops) != 1 or test.ops[0].op != "eq":
        return False
    asked, value = test.expr, test.ops[0].expr
    is_role = (isinstance(asked, nodes.Getattr) and asked.attr == "role") or (
        isinstance(asked, nodes.Getitem)
        and isinstance(asked.arg, nodes.Const)
        and asked.arg.value == "role"
    )
    return is_role and isinstance(value, nodes.Const) and value.value == "tool"


def _is_messages(node: nodes.Node | None, aliases: set[str]) -> bool:
    """Whether an expression is the messages, or the messages from a fixed one on."""
    if isinstance(node, nodes.CondExpr):
        return _is_messages(node.expr1, aliases) and _is_messages(node.expr2, aliases)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        start, stop, step = node.arg.start, node.arg.stop, node.arg.step
        is_rest = (start is None or _is_index(start)) and stop is None and step is None
        return is_rest and isinstance(node.node, nodes.Name) and node.node.name in aliases
    return isinstance(node, nodes.Name) and node.name in aliases


def _is_index(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and type(node.value) is int and node.value >= 0


def _backward_uses(tree: nodes.Template, aliases: set[str]) -> list[nodes.Name]:
    """The places where `messages` is looped over, renamed, or asked for one of a fixed place."""
    holders: list[nodes.Node] = []
    for item in tree.find_all(nodes.Getitem):
        # Any conversation, however short, has the first message; it may lack the second.
        is_first = isinstance(item.arg, nodes.Const) and item.arg.value == 0
        if is_first and isinstance(item.node, nodes.Name) and item.node.name == _MESSAGES:
            holders.append(item.node)
    for loop in tree.find_all(nodes.For):
        holders += _named(loop.iter, aliases)
    for assign in tree.find_all(nodes.Assign):
        holders += _named(assign.node, aliases)
    return [name for name in holders if isinstance(name, nodes.Name) and name.name in aliases]


def _named(node: nodes.Node, aliases: set[str]) -> list[nodes.Node]:
    if not _is_messages(node, aliases):
        return []
    if isinstance(node, nodes.CondExpr):
        assert node.expr2 is not None, "_is_messages asks for both"
        return _named(node.expr1, aliases) + _named(node.expr2, aliases)
    return [node.node] if isinstance(node, nodes.Getitem) else [node]


def _looks_back(loop: nodes.For) -> bool:
    """Whether the loop over messages reads nothing that lies ahead of a message.

    Ahead are the generation prompt and the attributes of `loop` about later messages. Inside an
    inner loop, `loop` means that one.
    """
    own_parts = [*loop.body, *([loop.test] if loop.test else [])]
    inner_parts = [part for inner in loop.find_all(nodes.For) for part in inner.body]
    of_inner_loops = {id(name) for name in _names(inner_parts)}
    asked_backward = {
        id(access.node)
        for access in _all_nodes(own_parts, nodes.Getattr)
        if access.attr in _BACKWARD
    }
    return all(
        name.name not in (_PROMPT, "loop")
        or (name.name == "loop" and id(name) in of_inner_loops | asked_backward)
        for name in _names(own_parts)
    )


def _names(parts: Sequence[nodes.Node]) -> list[nodes.Name]:
    return _all_nodes(parts, nodes.Name)


def _all_nodes(parts: Sequence[nodes.Node], kind: type[_Kind]) -> list[_Kind]:
    """The nodes of one kind among `parts` and in them; `find_all` looks in them alone."""
    roots = [part for part in parts if isinstance(part, kind)]
    return roots + [node for part in parts for node in part.find_all(kind)]
