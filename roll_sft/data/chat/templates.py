"""`data.chat_template` -> the text of a chat template: a named one, a file, or the tokenizer's own.

The named ones lie in `templates/`, written from the documented formats. Each begins with the
tokenizer's bos token if the tokenizer begins texts with it, and is exported with what was trained.
None has `{% generation %}` marks: no mask here needs them, and servers that do not render with
transformers do not know the tag.
"""

import logging
import os
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import TemplateSyntaxError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import SandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from roll_sft.base.errors import ConfigError
from roll_sft.data.chat.render import Renderer
from roll_sft.data.chat.sample import UnusableRow
from roll_sft.data.chat.template_limits import GenerationMarks

_log = logging.getLogger(__name__)

# Arguments of `apply_chat_template` that are no variables of a template; training sets them.
RESERVED = (
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
# name -> the control tokens that the format is made of, besides eos where `_ENDS_WITH_EOS`
NAMED: dict[str, tuple[str, ...]] = {
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "deepseek_r1": ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "simple_chat": (),
    "tulu": (),
    "vicuna": (),
    "zephyr": (),
}
_ENDS_WITH_EOS = ("alpaca", "deepseek_r1", "mistral", "simple_chat", "tulu", "vicuna", "zephyr")
# Functions that every template may call and that no user sets.
_GIVEN = ("raise_exception", "strftime_now", "namespace", "range", "dict")
_MOST_ADVISED = 3
_LONGEST_SHOWN = 100


def chat_template(value: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that `data.chat_template` asks for; None where the tokenizer's own is.

    Raises `ConfigError` if `value` is neither a name nor a file, or if the tokenizer lacks control
    tokens of the named format.
    """
    if value is None:
        return None
    if value in NAMED:
        return _named(value, tokenizer)
    if os.path.isfile(value):  # also of a name that no file system takes
        try:
            return Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"data.chat_template: {value!r} cannot be read ({error}); give a UTF-8 file"
            ) from error
    shown = value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}..."
    raise ConfigError(
        f"data.chat_template: {shown!r} is no file and not one of {', '.join(NAMED)}; give a "
        f"Jinja file, one of these names, or null for the tokenizer's own"
    )


def check_variables(variables: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ConfigError` for `data.template_kwargs` that a chat template does not read."""
    if not variables:
        return
    own = tokenizer.chat_template or {}
    templates = list(own.values()) if isinstance(own, dict) else [own]
    for name in sorted(variables):
        if name in RESERVED:
            raise ConfigError(
                f"data.template_kwargs: {name!r} is not the template's own: training itself "
                f"decides it; leave it out"
            )
    try:
        read = frozenset[str]().union(*map(variables_of, templates))
    except (TemplateSyntaxError, RecursionError):  # said where the template is compiled
        return
    if unread := sorted(set(variables) - read):
        known = ", ".join(sorted(read.difference(RESERVED, tokenizer.special_tokens_map, _GIVEN)))
        raise ConfigError(
            f"data.template_kwargs: the chat template reads no {unread[0]!r}, so it would change "
            f"nothing; it reads {known or 'none'}: leave it out, or choose another template"
        )


def check_row_variables(variables: Mapping[str, Any], renderer: Renderer) -> None:
    """Raise `UnusableRow` for variables of a row that training sets; warn of those not read."""
    if reserved := sorted(set(variables).intersection(RESERVED)):
        raise UnusableRow(
            f"the row's template variables hold '{reserved[0]}', which training itself decides; "
            f"remove it"
        )
    if unread := sorted(set(variables) - variables_of(renderer.template)):
        _log.warning(
            "rows set %s for the chat template, which does not read it: it changes nothing",
            ", ".join(unread),
        )


def variables_of(template: str) -> frozenset[str]:
    """The names that a template reads and does not set itself; it must be a valid template."""
    environment = SandboxedEnvironment(extensions=[GenerationMarks, loopcontrols])
    # jinja2 finds the names by compiling, and would compute constant expressions meanwhile.
    environment.intercepted_binops = frozenset(environment.binop_table)
    environment.filters = dict.fromkeys(environment.filters, _not_applied)
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


@jinja2.pass_context
def _not_applied(_context: Any) -> None:
    """Stands for each filter where nothing is rendered."""


def fitting_templates(
    control_tokens: Collection[str], *, eos_token: str | None, begins_with_bos: bool
) -> dict[str, str]:
    """Name -> text of the named templates whose control tokens a tokenizer has."""
    return {
        name: _text(name, begins_with_bos=begins_with_bos)
        for name in NAMED
        if not _missing(name, control_tokens, eos_token=eos_token)
    }


def preferred(names: Collection[str]) -> list[str]:
    """Those of some names to advise: the ones made of the tokenizer's own control tokens first."""
    native = [name for name in names if NAMED[name]]
    return (native or list(names))[:_MOST_ADVISED]


def _named(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    known, eos_token = added.union(tokenizer.all_special_tokens), tokenizer.eos_token
    begins = tokenizer("", add_special_tokens=True).input_ids[:1] == [tokenizer.bos_token_id]
    if missing := _missing(name, known, eos_token=eos_token):
        fitting = preferred(fitting_templates(known, eos_token=eos_token, begins_with_bos=begins))
        remedy = f"use {' or '.join(fitting)}" if fitting else "use the tokenizer's own (null)"
        raise ConfigError(
            f"data.chat_template: {name!r} needs {', '.join(missing)} as control tokens, which the "
            f"tokenizer lacks; {remedy}, or give a tokenizer that has them (model.tokenizer_path)"
        )
    return _text(name, begins_with_bos=begins)


def _missing(name: str, known: Collection[str], *, eos_token: str | None) -> list[str]:
    missing = [token for token in NAMED[name] if token not in known]
    if name in _ENDS_WITH_EOS and eos_token is None:
        missing.append("an eos_token")
    return missing


def _text(name: str, *, begins_with_bos: bool) -> str:
    text = resources.files("roll_sft.data.chat").joinpath("templates", f"{name}.jinja")
    return ("{{- bos_token }}\n" if begins_with_bos else "") + text.read_text(encoding="utf-8")
