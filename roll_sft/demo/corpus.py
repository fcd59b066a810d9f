"""The demonstration's text: questions on Python's standard library, answered by its documentation.

`documentation_examples` runs this file in a bare interpreter (`-I -S`), because libraries patch the
standard one when they are imported: transformers adds methods to `logging.Logger`, torch replaces
`inspect.getfile`. Standard library only, so that the bare interpreter can run it.

Promises: the examples depend on the Python version alone; each answer occurs once and is the
beginning of a documentation string, in whole paragraphs.
"""

import hashlib
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType

MIN_ANSWER_CHARS = 40
MAX_ANSWER_CHARS = 600

# (instruction, input): some questions have the name in the optional column, as real data does.
PHRASINGS = (
    ("What does `{name}` do?", ""),
    ("Explain the {kind} `{name}` of Python's standard library.", ""),
    ("What does this Python {kind} do?", "{name}"),
    ("Give the documentation of the {kind} named below.", "`{name}`"),
)

# Importing these changes nothing, needs no optional C library, and works on Python 3.11 and later.
# One long string: a list of 130 quoted names would fill two screens.
MODULES = """
abc argparse array ast asyncio base64 bisect builtins calendar cmath cmd code codecs collections
collections.abc concurrent.futures configparser contextlib contextvars copy copyreg csv dataclasses
datetime decimal difflib dis doctest email.headerregistry email.message email.policy email.utils
enum filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib
hashlib heapq hmac html html.parser http.client http.cookiejar http.cookies http.server imaplib
importlib importlib.abc importlib.metadata importlib.util inspect io ipaddress itertools json
keyword linecache locale logging logging.config logging.handlers mailbox marshal math mimetypes
modulefinder multiprocessing netrc numbers operator optparse os os.path pathlib pickle pkgutil
platform plistlib poplib pprint pstats queue quopri random re reprlib runpy sched secrets select
selectors shelve shlex shutil signal smtplib socket socketserver stat statistics string struct
subprocess symtable sys sysconfig tarfile tempfile textwrap threading time timeit token tokenize
trace traceback tracemalloc types typing unicodedata unittest urllib.error urllib.parse
urllib.request urllib.robotparser uuid warnings weakref wsgiref.handlers wsgiref.headers
wsgiref.util xml.dom.minidom xml.etree.ElementTree xml.sax.handler xmlrpc.client xmlrpc.server
zipfile zipimport zoneinfo
"""


@dataclass(frozen=True, slots=True)
class Example:
    """One row in Alpaca's columns. `output` is the beginning of a documentation string."""

    instruction: str
    input: str
    output: str


def documentation_examples() -> list[Example]:
    """Every example, in an order that is fixed and mixes the modules."""
    bare = [sys.executable, "-I", "-S", __file__]
    lines = subprocess.run(bare, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [Example(**json.loads(line)) for line in lines.splitlines()]


def examples_of(module_names: list[str]) -> list[Example]:
    """The examples of `module_names` as this interpreter sees them, in the order of name hashes."""
    by_answer: dict[str, tuple[str, str]] = {}
    for module_name in module_names:
        for name, kind, text in documented(module_name):
            answer = first_paragraphs(text)
            if len(answer) >= MIN_ANSWER_CHARS:
                by_answer.setdefault(answer, (name, kind))
    rows = [(name, kind, answer) for answer, (name, kind) in by_answer.items()]
    rows.sort(key=lambda row: name_hash(row[0]))
    return [phrase(name, kind=kind, answer=answer) for name, kind, answer in rows]


def documented(module_name: str) -> Iterator[tuple[str, str, str]]:
    """(name, kind, cleaned documentation) of a module's public functions, classes and methods."""
    for name, value in public_members(importlib.import_module(module_name)):
        kind = "class" if inspect.isclass(value) else "function"
        if isinstance(value.__doc__, str):
            yield f"{module_name}.{name}", kind, inspect.cleandoc(value.__doc__)
        if not inspect.isclass(value):
            continue
        # vars(), not dir(): an inherited method belongs to the class that documents it.
        for member_name, member in sorted(vars(value).items()):
            if member_name.startswith("_") or not isinstance(member.__doc__, str):
                continue
            if inspect.isroutine(member) or isinstance(member, classmethod | staticmethod):
                text = inspect.cleandoc(member.__doc__)
                yield f"{module_name}.{name}.{member_name}", "method", text


def public_members(module: ModuleType) -> list[tuple[str, object]]:
    """The functions and classes a module offers: its `__all__`, or what it defines itself."""
    members = vars(module)
    chosen: list[tuple[str, object]] = []
    for name in sorted(members.get("__all__", members)):
        value = members.get(name)
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if "__all__" in members or value.__module__ == module.__name__:
            chosen.append((name, value))
    return chosen


def first_paragraphs(text: str) -> str:
    """As many whole paragraphs as MAX_ANSWER_CHARS holds; empty when the first is longer."""
    answer = ""
    for end in range(1, min(len(text), MAX_ANSWER_CHARS) + 1):
        if end == len(text) or text.startswith("\n\n", end):
            answer = text[:end]
    return answer.rstrip()


def phrase(name: str, *, kind: str, answer: str) -> Example:
    """The example that asks for `name`, in a phrasing that its hash picks."""
    name = name.removeprefix("builtins.")
    instruction, query = PHRASINGS[name_hash(name)[0] % len(PHRASINGS)]
    return Example(
        instruction=instruction.format(name=name, kind=kind),
        input=query.format(name=name),
        output=answer,
    )


def name_hash(name: str) -> bytes:
    """An order, and a choice, that stays when other names come or go."""
    return hashlib.sha256(name.encode()).digest()


if __name__ == "__main__":
    sys.stdout.writelines(json.dumps(asdict(row)) + "\n" for row in examples_of(MODULES.split()))
