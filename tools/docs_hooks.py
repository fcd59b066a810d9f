"""A hook of the documentation site, for code within a line.

Options and commands, such as `roll-sft`, stay on one line. In a table a bar is written with a
backslash, which GitHub leaves out and Python-Markdown does not.
"""

import re
from typing import Any

_INLINE_CODE = re.compile(r"<code>([^<]*)</code>")
_HYPHENATED = re.compile(r"-{1,2}[A-Za-z][\w-]*|\w+(?:-\w+)+")


def on_page_content(html: str, **_: Any) -> str:
    """The page with such words marked, for site.css, and bars without their backslash."""
    return _INLINE_CODE.sub(_shown, html)


def _shown(code: re.Match[str]) -> str:
    text = code[1].replace(r"\|", "|")
    text = _HYPHENATED.sub(lambda word: f'<span class="whole">{word[0]}</span>', text)
    return f"<code>{text}</code>"
