"""From what Hydra composes, and what a user typed, to plain values.

The only module that knows OmegaConf: the defaults that Hydra composes on, references resolved, and
texts as they were typed. To Hydra's grammar and to YAML `run_name=2024_11_25` is the integer
20241125, and `1e3` is 1000.0; the schema knows which keys take text, so those keep their
characters. Relies on Hydra's generated parser and on the place where OmegaConf makes its YAML
loader; both are pinned, and tested.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import omegaconf._utils
import yaml
from antlr4 import CommonTokenStream, InputStream  # type: ignore[import-untyped]
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from roll_sft.base.errors import ConfigError, first_line
from roll_sft.base.text import refer, shown
from roll_sft.config.build import RESERVED
from roll_sft.config.fields import all_keys, all_names, section_of
from roll_sft.config.schema import RunConfig

_NUMBERS = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL)
_LONGEST_NUMBER = 100  # digits; Python refuses to read thousands of them
# YAML 1.1 reads 010 as eight and 1:30 as ninety; the configuration reads ten, and refuses 1:30.
_YAML_1_1 = re.compile(r"[+-]?(0[0-9_]+$|[0-9_]+:)")
# Outside quotes, which Hydra's grammar asks for around a ~; a shell leaves that of `key=~/x` alone.
_HOME = re.compile(r"""('(?:\\.|[^'])*'|"(?:\\.|[^"])*")|(?<=[=:,\[\s])~(?=/)""")
_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([^\s,}]+)")
_YAML_TEXT = "tag:yaml.org,2002:str"
_YAML_NUMBERS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool"))


def schema() -> DictConfig:
    """Every key with its default, for Hydra to compose on.

    Without types: Hydra would stop at the first wrong one, and does not say where in a list it is.
    """
    node: DictConfig = OmegaConf.create(dataclasses.asdict(RunConfig()))
    for each in all_keys(RunConfig):
        if isinstance(each.default, dict):  # a mapping, whose keys are the user's
            OmegaConf.set_struct(OmegaConf.select(node, each.name), False)
    return node


def resolved(composed: DictConfig) -> dict[str, Any]:
    """Plain values of `composed`, references resolved, over all defaults, which they may refer to.

    What comes from the environment is written as its reference from now on.
    Raises `ConfigError` for a reference that leads nowhere.
    """
    given: Any = OmegaConf.to_container(composed, resolve=False)
    refer(_environment_values(given))
    try:
        full = OmegaConf.create(over(dataclasses.asdict(RunConfig()), given))
        values: Any = OmegaConf.to_container(full, resolve=True)
    except OmegaConfBaseException as error:
        name = getattr(error, "full_key", None) or "configuration"
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{name}: {reason}; mend the reference or write the value") from error
    return dict(values)


def stored_values(path: Path) -> dict[str, Any]:
    """Plain values of the composed configuration at `path`, which a run has written.

    Raises `ConfigError` where it cannot be read.
    """
    try:
        with yaml_as_typed():
            composed: Any = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {first_line(error)}; restore it") from error
    return resolved(composed)


def _environment_values(unresolved: Any) -> dict[str, str]:
    """Value -> reference, of each variable of the environment that `unresolved` refers to."""
    if isinstance(unresolved, dict):
        unresolved = list(unresolved.values())
    if isinstance(unresolved, list):
        return {v: name for each in unresolved for v, name in _environment_values(each).items()}
    names = _ENVIRONMENT.findall(unresolved) if isinstance(unresolved, str) else []
    return {os.environ[name]: f"${{oc.env:{name}}}" for name in names if name in os.environ}


def override_as_typed(argument: str) -> str:
    """The override `argument`, with quotes around numbers that a text key takes, and ~/ as a path.

    An unknown key of a known section gets Hydra's `++`, so that it is refused together with all
    other problems. What Hydra cannot parse is returned unchanged, for Hydra to refuse. Raises
    `ConfigError` for a key of the entries of a list, such as `data.train.path`.
    """
    argument = _HOME.sub(lambda found: found[1] or str(Path.home()), argument)
    lexer = OverrideLexer(InputStream(argument))
    lexer.removeErrorListeners()
    parser: Any = OverrideParser(CommonTokenStream(lexer))
    parser.removeErrorListeners()
    tree = parser.override()
    if parser.getNumberOfSyntaxErrors() or tree.value() is None:
        return argument
    name = tree.key().getText()
    for each in _lists():
        if re.match(rf"{each}\.\D", name):
            raise ConfigError(
                f"{shown(name)}: {each} is a list of sources; give it whole, as in"
                f" '{each}=[{{path: my.jsonl}}]'"
            )
    for start, stop in reversed(list(_to_quote(tree.value(), name))):
        argument = f"{argument[:start]}'{argument[start:stop]}'{argument[stop:]}"
    is_known_section = name.partition(".")[0] in _sections() and "." in name
    if argument.startswith(name) and is_known_section and name not in _names():
        return f"++{argument}"
    return argument


@contextmanager
def yaml_as_typed() -> Iterator[None]:
    """Within the block, text keys of YAML files that OmegaConf loads keep their characters."""
    original: Any = omegaconf._utils.get_yaml_loader

    def loader() -> Any:
        class Loader(original()):  # type: ignore[misc]
            def get_single_node(self) -> yaml.Node | None:
                node: yaml.Node | None = super().get_single_node()
                _mark_texts(node, "")
                return node

        return Loader

    omegaconf._utils.get_yaml_loader = loader
    try:
        yield
    finally:
        omegaconf._utils.get_yaml_loader = original


def text_of(values: Any) -> str:
    """Plain `values` as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(values))


def over(defaults: Any, values: Any) -> Any:
    """`values` over `defaults`, section by section; anything that is no section replaces."""
    if not (isinstance(defaults, dict) and isinstance(values, dict)):
        return values
    return {**defaults, **{name: over(defaults.get(name), values[name]) for name in values}}


def _to_quote(context: Any, name: str) -> Iterator[tuple[int, int]]:
    """Where numbers stand that `name` takes as text: (start, stop), in the order of the text."""
    kind = type(context)
    if kind is OverrideParser.PrimitiveContext:
        tokens = [child.symbol for child in context.getChildren()]
        tokens = [token for token in tokens if token.type != OverrideLexer.WS]
        if len(tokens) == 1 and tokens[0].type in _NUMBERS:
            start, stop = tokens[0].start, tokens[0].stop + 1
            if _is_text(name) or stop - start > _LONGEST_NUMBER:
                yield start, stop
    elif kind is OverrideParser.DictKeyValuePairContext:
        yield from _to_quote(context.element(), f"{name}.{context.dictKey().getText()}")
    elif kind is not OverrideParser.FunctionContext:
        for child in context.getChildren() if hasattr(context, "getChildren") else ():
            yield from _to_quote(child, name)


def _mark_texts(node: yaml.Node | None, name: str) -> None:
    """Have plain scalars under text keys read as text; a file may hold a part of a section."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _mark_texts(value, f"{name}.{key.value}".lstrip("."))
    elif isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _mark_texts(each, name)
    elif (
        isinstance(node, yaml.ScalarNode)
        and node.tag in _YAML_NUMBERS
        and (_is_text(name) or _YAML_1_1.match(node.value))
    ):
        node.tag = _YAML_TEXT


def _is_text(name: str) -> bool:
    """Whether `name`, or a section's part of a dotted name, takes text."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts) in _texts()


@functools.cache
def _texts() -> frozenset[str]:
    """Dotted names of text keys, and their ends: a file of the package `model` begins at `path`."""
    names = [each.name.split(".") for each in all_keys(RunConfig) if each.is_text]
    return frozenset(".".join(name[start:]) for name in names for start in range(len(name)))


@functools.cache
def _lists() -> tuple[str, ...]:
    """The keys whose entries have keys of their own."""
    return tuple(each.name for each in all_keys(RunConfig) if section_of(each.kind) is not None)


@functools.cache
def _names() -> frozenset[str]:
    return frozenset(all_names(RunConfig))


@functools.cache
def _sections() -> frozenset[str]:
    return frozenset(name.partition(".")[0] for name in (*_names(), *RESERVED))
