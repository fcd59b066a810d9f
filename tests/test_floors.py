"""The building's rules, enforced on every source file: who imports whom, how large things get.

`findings` reads one file's text and returns what breaks a rule, as `line: what`. The rules are
tested on small sources below: a rule that never fires would pass for ever.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "roll_sft"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 6

# First match wins. A module imports its own floor or below.
FLOORS = (
    ("roll_sft/base/", 0),
    ("roll_sft/config/", 0),
    ("roll_sft/data/rows/", 1),
    ("roll_sft/data/steps/", 1),
    ("roll_sft/data/__init__.py", 1),
    ("roll_sft/models/", 1),
    ("roll_sft/checkpoint/", 2),
    ("roll_sft/data/chat/", 2),
    ("roll_sft/data/tokens/", 3),
    ("roll_sft/engine/", 4),
    ("roll_sft/job/", 5),
    ("roll_sft/runtime/", 6),
    ("roll_sft/convert/", 7),
    ("roll_sft/evaluation/", 7),
    ("roll_sft/chat/", 7),
    ("roll_sft/doctor/", 7),
    ("roll_sft/migrate/", 7),
    ("roll_sft/parity/", 7),
    ("roll_sft/preview/", 7),
    ("roll_sft/python_api/", 7),
    ("roll_sft/report/", 7),
    ("roll_sft/submit/", 7),
    ("roll_sft/tracking/", 7),
    ("roll_sft/training/", 7),
    ("roll_sft/", 8),
)
STRANGERS = (("roll_sft/data/", "roll_sft/models/"), ("roll_sft/models/", "roll_sft/data/"))
DOORS = ("roll_sft/run.py", "roll_sft/api.py", "roll_sft/cli.py")
ONLY_IN = {
    "hydra": (*DOORS, "roll_sft/config/composed.py"),
    "megatron": ("roll_sft/engine/",),
    "mlflow": ("roll_sft/tracking/",),
    "omegaconf": ("roll_sft/config/composed.py", "roll_sft/run.py"),
    "ray": ("roll_sft/runtime/", *DOORS),
    "tensorboard": ("roll_sft/tracking/",),
    "wandb": ("roll_sft/tracking/",),
}
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")  # split, or this line would be one

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (PACKAGE, "conf", "tools", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)


def floor_of(path: str) -> int:
    return next(floor for prefix, floor in FLOORS if path.startswith(prefix))


def module_path(module: str) -> str | None:
    """The file of a module of ours, or None: it is a name inside a module, or not ours."""
    stem = module.replace(".", "/")
    for candidate in (f"{stem}.py", f"{stem}/__init__.py"):
        if (ROOT / candidate).is_file():
            return candidate
    return None


def parsed(path: str) -> ast.AST:
    """The syntax tree of a source file."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def imported_modules(tree: ast.AST, path: str) -> Iterator[tuple[str, int]]:
    """(module, line) of every import in the file: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(node, path)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if module_path(inner) else base, node.lineno
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            names = [argument for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from ((str(name.value), node.lineno) for name in names)


def absolute_base(node: ast.ImportFrom, path: str) -> str:
    if not node.level:
        return node.module or ""
    folders = Path(path).parts[: -node.level]
    return ".".join((*folders, *([node.module] if node.module else ())))


def called_name(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def import_findings(tree: ast.AST, path: str) -> Iterator[str]:
    for module, line in imported_modules(tree, path):
        library = module.partition(".")[0]
        if library in ONLY_IN and not path.startswith(ONLY_IN[library]):
            yield f"{line}: imports {library}, which is for {', '.join(ONLY_IN[library])}"
        target = module_path(module) if library == PACKAGE else None
        if target is None:
            continue
        if floor_of(target) > floor_of(path):
            yield f"{line}: floor {floor_of(path)} imports {module} of floor {floor_of(target)}"
        if any(path.startswith(one) and target.startswith(other) for one, other in STRANGERS):
            yield f"{line}: data and models never import each other, but this imports {module}"


def size_findings(tree: ast.AST, source: str) -> Iterator[str]:
    num_lines = len(source.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"1: {num_lines} lines, the most is {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            yield f"{node.lineno}: {node.name} has {length} lines, the most is {MAX_FUNCTION_LINES}"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        num_parameters = sum(argument.arg not in ("self", "cls") for argument in arguments)
        if num_parameters > MAX_PARAMETERS:
            most = f"the most is {MAX_PARAMETERS}"
            yield f"{node.lineno}: {node.name} has {num_parameters} parameters, {most}"


def habit_findings(tree: ast.AST, path: str) -> Iterator[str]:
    last_resorts = set(exit_code_handlers(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "print":
                yield f"{node.lineno}: prints; use logging"
        elif isinstance(node, ast.Assert) and node.msg is None:
            yield f"{node.lineno}: assert without a message"
        elif isinstance(node, ast.ExceptHandler) and swallows(node) and node not in last_resorts:
            yield f"{node.lineno}: catches everything and does not raise"


def exit_code_handlers(tree: ast.AST) -> Iterator[ast.AST]:
    """Handlers of a `main` that report the error: a process ends there, with an exit code."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name != "main":
            continue
        for handler in ast.walk(function):
            calls = [node for node in ast.walk(handler) if isinstance(node, ast.Call)]
            if isinstance(handler, ast.ExceptHandler) and "report" in map(called_name, calls):
                yield handler


def swallows(handler: ast.ExceptHandler) -> bool:
    return is_broad(handler) and not raises(handler)


def is_broad(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException"))
        for kind in kinds
    )


def raises(handler: ast.ExceptHandler) -> bool:
    """Whether the handler's own code raises; a function defined in it does not count."""
    todo: list[ast.AST] = list(handler.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))
    return False


def findings(source: str, path: str) -> list[str]:
    """What in `source`, were it the file `path`, breaks a rule."""
    tree = ast.parse(source, path)
    found = list(size_findings(tree, source))
    if path.startswith(f"{PACKAGE}/"):
        found += import_findings(tree, path)
        found += habit_findings(tree, path)
    for number, line in enumerate(source.splitlines(), start=1):
        if UNFINISHED.search(line):
            found.append(f"{number}: a note of unfinished work; finish it or leave it out")
    return found


@pytest.mark.parametrize("path", SOURCES)
def test_source_keeps_the_rules(path):
    found = findings((ROOT / path).read_text(encoding="utf-8"), path)
    assert not found, "\n" + "\n".join(f"{path}:{finding}" for finding in found)


def test_sources_of_every_floor_are_read():
    floors = {floor_of(path) for path in SOURCES if path.startswith(f"{PACKAGE}/")}
    assert floors == set(range(9))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("roll_sft/base/layout.py", "from roll_sft.data import chat"),
        ("roll_sft/data/chat/chat.py", "def f():\n    import roll_sft.models.family"),
        ("roll_sft/models/family.py", "from roll_sft import data"),
        ("roll_sft/data/chat/chat.py", "from ...engine import loss"),
        ("roll_sft/data/chat/chat.py", "from ... import engine"),
        ("roll_sft/data/chat/chat.py", "if TYPE_CHECKING:\n    from roll_sft.runtime import group"),
        ("roll_sft/engine/loss.py", "import ray.util"),
        ("roll_sft/engine/loss.py", "import importlib\nimportlib.import_module('mlflow')"),
        ("roll_sft/data/steps/batch.py", "from megatron.core import parallel_state"),
        ("roll_sft/runtime/group.py", "import hydra"),
        ("roll_sft/training/driver.py", "from omegaconf import OmegaConf"),
        ("roll_sft/base/layout.py", "import roll_sft"),
        ("roll_sft/training/driver.py", "print('step')"),
        ("roll_sft/training/driver.py", "assert x > 0"),
        ("roll_sft/training/driver.py", "try:\n    f()\nexcept Exception:\n    pass"),
        (
            "roll_sft/training/driver.py",
            "try:\n    f()\nexcept (OSError, BaseException) as error:\n    g(error)",
        ),
        (
            "roll_sft/training/driver.py",
            "try:\n    f()\nexcept:\n    def g():\n        raise ValueError(1)",
        ),
        (
            "roll_sft/run.py",
            "def main():\n    try:\n        f()\n    except Exception:\n        return 1",
        ),
        (
            "roll_sft/run.py",
            "def f():\n    try:\n        g()\n    except Exception:\n        report()",
        ),
        ("roll_sft/training/driver.py", "def f(a, b, c, d, *, e, g, h): ..."),
        ("roll_sft/training/driver.py", "def f():\n" + "    x = 1\n" * 80),
        ("tools/convert.py", "x = 1\n" * 401),
        ("tools/convert.py", "# TODO: later"),
    ],
)
def test_broken_rule_is_found(path, source):
    assert len(findings(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "roll_sft/data/chat/chat.py",
            "from roll_sft.base.errors import DataError\nfrom . import packing",
        ),
        ("roll_sft/engine/loss.py", "import megatron.core\nfrom roll_sft.models import family"),
        ("roll_sft/runtime/group.py", "import ray\nfrom roll_sft.engine import engine"),
        ("roll_sft/tracking/mlflow_run.py", "def f():\n    import mlflow"),
        ("roll_sft/training/driver.py", "from roll_sft.runtime import group"),
        ("roll_sft/run.py", "import hydra"),
        ("roll_sft/training/driver.py", "import raytracer\nconsole.print('x')"),
        ("roll_sft/training/driver.py", "try:\n    f()\nexcept BaseException:\n    g()\n    raise"),
        (
            "roll_sft/run.py",
            "def main():\n    try:\n        f()\n    except Exception:\n        report()",
        ),
        ("roll_sft/training/driver.py", "try:\n    f()\nexcept OSError:\n    pass"),
        ("roll_sft/training/driver.py", "class C:\n    def f(self, a, b, c, d, e, g): ..."),
        ("roll_sft/training/driver.py", "def f():\n" + "    x = 1\n" * 79),
        ("tools/convert.py", "import ray\nprint('x')\nassert ray"),
    ],
)
def test_kept_rule_is_not_reported(path, source):
    assert findings(source, path) == []
