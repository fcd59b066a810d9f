"""A hook of the documentation site: no line of a page ends within an option such as `--detach`."""

import re
from typing import Any

_INLINE_CODE = re.compile(r"<code>([^<]*)</code>")
_OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


def on_page_content(html: str, **_: Any) -> str:
    """The page with its options marked; site.css keeps them whole."""
    return _INLINE_CODE.sub(_marked, html)


def _marked(code: re.Match[str]) -> str:
    text = _OPTION.sub(lambda option: f'<span class="option">{option[0]}</span>', code[1])
    return f"<code>{text}</code>"
