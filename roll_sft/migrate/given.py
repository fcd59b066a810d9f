"""The keys of another trainer's configuration, flat, with a note of those that have been read."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from roll_sft.base.errors import ConfigError
from roll_sft.base.text import shown

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_NAME = re.compile(r"\$(\w+)")
_BRACED = re.compile(r"\$\{(\w+)(?::-([^{}]*))?\}")  # an innermost one
_CONFIG_FLAGS = ("--config", "--config_file", "--config-file")
_MODULE = re.compile(r"openrlhf|verl|skyrl|roll")
_MOST_BYTES = 4 * 1024**2
WORLD = "(launcher)."  # before keys that the launcher was given, such as (launcher).num_processes


class Given:
    """Values by their dotted names. What is never taken is reported as unknown.

    A text that is a number becomes one, as these trainers' parsers read `1e-5` in YAML.
    """

    def __init__(self, values: Mapping[str, Any], *, command: str = "", folder: Path = Path()):
        self.values = {name: _as_number(value) for name, value in _flat(values)}
        self.command = command  # the program of a command line, empty for a file of keys
        self.folder = folder  # of the file, which relative paths may start from
        self.taken = set[str]()

    def take(self, *names: str, default: Any = None) -> Any:
        """The value of the first of `names` that is there and not null; marks all of them read."""
        found = default
        for name in reversed(names):
            if name in self.values:
                self.taken.add(name)
                found = self.values[name] if self.values[name] is not None else found
        return found

    def number(self, *names: str, default: float | None = None) -> Any:
        """As `take`, of a number. Raises `ConfigError` for anything else."""
        name, value = self.name_of(*names), self.take(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ConfigError(f"{name}: {shown(value)} is no number; give one, then import")
        return value

    def name_of(self, *names: str) -> str | None:
        """The first of `names` that has a value."""
        return next((name for name in names if self.values.get(name) is not None), None)

    def __contains__(self, name: object) -> bool:
        return self.values.get(str(name)) is not None

    def has_below(self, prefix: str) -> bool:
        """Whether a key lies below the section `prefix`."""
        return any(name.startswith(f"{prefix}.") for name in self.values)

    def left(self) -> list[str]:
        """The names that nothing has taken."""
        return [name for name in self.values if name not in self.taken]


def read_given(path: Path) -> Given:
    """The keys in `path`: YAML, JSON, or a shell script with the command that trains.

    Raises `ConfigError` for a file that cannot be read as any of them.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(
                f"{path}: {path.stat().st_size} bytes are no configuration; give its YAML, JSON or"
                " shell script"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as text ({error}); give a readable file"
        ) from None
    if path.suffix in (".sh", ".bash", ".slurm", ".txt") or text.startswith("#!"):
        return _of_script(text, path)
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path}: no valid YAML or JSON ({reason}); mend it, then import"
        ) from None
    if isinstance(values, str):  # one command line
        return _of_script(text, path)
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{path}: holds no keys; give a trainer's YAML, JSON or shell script")
    return Given(values, folder=path.parent)


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _as_number(value: Any) -> Any:
    if not isinstance(value, str) or not _NUMBER.fullmatch(value.strip()):
        return value
    return int(value) if re.fullmatch(r"[+-]?\d+", value.strip()) else float(value)


def _of_script(text: str, path: Path) -> Given:
    """The longest command of a script: `--key value`, `--flag`, `key=value`."""
    home = str(Path.home())
    variables, commands = dict[str, str](), list[list[str]]()
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        try:
            words = shlex.split(_expanded(line, {"HOME": home, **variables}), comments=True)
        except ValueError as error:
            raise ConfigError(f"{path}: {shown(line)} is no shell command ({error})") from None
        words = words[1:] if words[:1] == ["export"] else words
        while words and (assignment := _ASSIGNMENT.fullmatch(words[0])):
            variables[assignment[1]] = re.sub(r"^~(?=/)", home, assignment[2])
            del words[0]
        commands.append([re.sub(r"^~(?=/)", home, word) for word in words])
    command = max(commands, key=len, default=[])
    arguments = [index for index, word in enumerate(command) if _is_argument(word)]
    if not arguments:
        raise ConfigError(f"{path}: no command with --key value in it; give the one that trains")
    return _of_command(command, path, {f"{WORLD}{k}": v for k, v in variables.items()})


def _of_command(command: list[str], path: Path, values: dict[str, Any]) -> Given:
    """The arguments of a launcher, up to the program, and those of the program behind it."""
    program = _program(command)
    prefix, words = WORLD, list[str]()
    name: str | None = None
    for index, word in enumerate(command):
        if index == program:
            prefix, name = "", None
        elif word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            values[prefix + key] = value if equals else True
            name = None if equals else prefix + key
        elif "=" in word and name is None and re.match(r"\+{0,2}[A-Za-z_][\w.]*=", word):
            key, _, value = word.lstrip("+").partition("=")
            values[prefix + key] = _value(value)
        elif name is not None:
            given = values[name]
            many = given if isinstance(given, list) else ([] if given is True else [given])
            values[name] = [*many, word] if many else _value(word)
        else:
            words.append(word)
    return Given(values, command=" ".join(command[: program + 1]), folder=path.parent)


def _program(command: list[str]) -> int:
    """The index of the program that trains, in a command that may begin with a launcher."""
    for index in range(len(command) - 1, -1, -1):
        word, before = command[index], command[index - 1] if index else ""
        is_script = word.endswith(".py") and not _is_argument(word) and before not in _CONFIG_FLAGS
        is_module = before in ("-m", "--module") and _MODULE.search(word)
        if is_script or is_module:
            return index
    for index, word in enumerate(command):
        if word in ("sft", "train") and index:  # trl sft, megatron sft, swift sft, llamafactory-cli
            return index
    return 0


def _is_argument(word: str) -> bool:
    return word.startswith("--") or bool(re.match(r"[A-Za-z_][\w.]*=", word))


def _value(word: str) -> Any:
    """A value as YAML reads it: true, null, [a, b] and the like."""
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """`text` with the variables that the script sets; others stay as they are."""

    def value(match: re.Match[str]) -> str:
        default = match[2] if match.re is _BRACED else None
        return variables.get(match[1], f"${match[1]}" if default is None else default)

    # Names without braces first: what a variable holds is not expanded again, as in a shell.
    before, text = None, _NAME.sub(value, text)
    while text != before:  # a default may hold defaults
        before, text = text, _BRACED.sub(value, text)
    return text
