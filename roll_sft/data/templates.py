"""`data.chat_template` -> the text of a chat template: a named one, a file, or the tokenizer's own.

The named ones lie in `templates/`, written from the documented formats. Each begins with the
tokenizer's bos token if the tokenizer begins texts with it, and is exported with what was trained.
None has `{% generation %}` marks: no mask here needs them, and servers that do not render with
transformers do not know the tag.
"""

from importlib import resources
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from roll_sft.errors import ConfigError

# name -> the control tokens that the format is made of, besides eos where `_ENDS_WITH_EOS`
NAMED: dict[str, tuple[str, ...]] = {
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "simple_chat": (),
    "tulu": (),
    "vicuna": (),
    "zephyr": (),
}
_ENDS_WITH_EOS = ("alpaca", "mistral", "simple_chat", "tulu", "vicuna", "zephyr")


def chat_template(value: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that `data.chat_template` asks for; None where the tokenizer's own is.

    Raises `ConfigError` if `value` is neither a name nor a file, or if the tokenizer lacks control
    tokens of the named format.
    """
    if value is None:
        return None
    if value in NAMED:
        return _named(value, tokenizer)
    path = Path(value)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"data.chat_template: {value!r} cannot be read ({error}); give a UTF-8 file"
            ) from error
    raise ConfigError(
        f"data.chat_template: {value!r} is no file and not one of {', '.join(NAMED)}; give a "
        f"Jinja file, one of these names, or null for the tokenizer's own"
    )


def _named(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    known = added.union(tokenizer.all_special_tokens)
    missing = [token for token in NAMED[name] if token not in known]
    if name in _ENDS_WITH_EOS and tokenizer.eos_token is None:
        missing.append("an eos_token")
    if missing:
        fitting = [
            other
            for other, tokens in NAMED.items()
            if known.issuperset(tokens) and (tokenizer.eos_token or other not in _ENDS_WITH_EOS)
        ]
        remedy = f"use {' or '.join(fitting)}" if fitting else "use the tokenizer's own (null)"
        raise ConfigError(
            f"data.chat_template: {name!r} needs {', '.join(missing)} as control tokens, which the "
            f"tokenizer lacks; {remedy}, or give a tokenizer that has them (model.tokenizer_path)"
        )
    text = resources.files("roll_sft.data").joinpath("templates", f"{name}.jinja")
    first = tokenizer("", add_special_tokens=True).input_ids[:1]
    begins = first == [tokenizer.bos_token_id]
    return ("{{- bos_token }}\n" if begins else "") + text.read_text(encoding="utf-8")
