"""`roll-sft chat`: a conversation in the terminal, or of lines that are piped in.

Answers go to stdout and everything else to stderr, so that a script reads answers alone. Ctrl-C
ends an answer, and at the prompt the conversation.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from roll_sft.base.errors import DataError
from roll_sft.base.text import is_hostile
from roll_sft.chat.speaker import Sampling, Speaker

HELP = (
    "/reset forgets the conversation; /system TEXT begins anew with a system message, /system alone"
    " without one; /exit ends; //TEXT says /TEXT"
)
PROMPT = "> "


class Conversation:
    """What was said so far, and how to go on."""

    def __init__(self, speaker: Speaker, sampling: Sampling, *, system: str | None) -> None:
        self._speaker, self._sampling = speaker, sampling
        self._begin(system)

    def say(self, line: str) -> bool:
        """Take one line of the user, a command or a message; returns whether to go on."""
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return False
        if command == "/reset":
            self._begin(self._system)
            _note("the conversation is forgotten")
        elif command == "/system":
            self._begin(rest.strip() or None)
            _note(f"system message: {self._system}" if self._system else "no system message")
        elif command.startswith("/") and not command.startswith("//"):
            _note(HELP if command == "/help" else f"there is no command {command!r}; {HELP}")
        elif line.strip():
            self._answer(line.strip().removeprefix("/") if line.startswith("//") else line.strip())
        return True

    def _begin(self, system: str | None) -> None:
        self._system = system
        self._messages: list[Mapping[str, Any]] = []
        if system:
            self._messages.append({"role": "system", "content": system})

    def _answer(self, text: str) -> None:
        """Ask, show the answer while it comes, and remember both."""
        asked = [*self._messages, {"role": "user", "content": text}]
        try:
            ids = self._speaker.prompt_ids(asked, where="this conversation")
        except DataError as error:
            _note(f"{error}, or forget it with /reset")
            return
        said, is_terminal = list[str](), sys.stdout.isatty()

        def show(part: str) -> None:
            said.append(part)
            sys.stdout.write(_harmless(part) if is_terminal else part)
            sys.stdout.flush()

        with contextlib.suppress(KeyboardInterrupt):  # what was said until then is kept
            said[:] = [self._speaker.stream(ids, self._sampling, show).text]
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._messages = [*asked, {"role": "assistant", "content": "".join(said)}]


def converse(speaker: Speaker, sampling: Sampling, *, system: str | None) -> None:
    """Answer each line of stdin until it ends, or until `/exit`."""
    conversation = Conversation(speaker, sampling, system=system)
    for line in _lines():
        if not conversation.say(line):
            break


def _lines() -> Iterator[str]:
    """Lines that are typed after a prompt, with a history to edit, or those of a pipe."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- gives `input` its editing
    _note(HELP)
    while True:
        try:
            yield input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return


def _note(text: str) -> None:
    sys.stderr.write(f"{_harmless(text)}\n")


def _harmless(text: str) -> str:
    """`text` without what a terminal would obey; line ends and tabs stay."""
    return "".join(repr(each)[1:-1] if each != "\n" and is_hostile(each) else each for each in text)
