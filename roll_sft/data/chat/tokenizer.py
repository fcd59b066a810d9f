"""A folder -> its tokenizer, checked against the model, or an error of one line."""

import json
import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from roll_sft.base.errors import ConfigError, first_line
from roll_sft.base.text import shown

_KEY = "model.tokenizer_path"
_REMEDY = "give a folder with tokenizer.json and tokenizer_config.json"
# Any tokenizer has one at least: its JSON, its vocabulary, SentencePiece's or tiktoken's file.
_READ_WHOLE = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_MOST_BYTES = 128 << 20  # the largest tokenizer.json has 35 MB
_LONGEST_TEMPLATE = 1 << 20  # characters; published ones have some 20,000
_FILES = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken", "tekken.json")


class NoTokenizerError(ConfigError):
    """The folder is there and holds no tokenizer."""


def load_tokenizer(
    path: str, *, trust_remote_code: bool, embedding_size: int
) -> PreTrainedTokenizerBase:
    """Return the tokenizer in the folder `path`, for a model of `embedding_size` token ids.

    Raises `ConfigError` if there is none, if its files are damaged, or if one of its ids has no row
    in the embedding.
    """
    if not Path(path).is_dir():
        raise ConfigError(f"{_KEY}: {shown(path)} is not a folder; give one, or a hub id")
    for file in Path(path).iterdir():  # which transformers would read whole
        if file.suffix in _READ_WHOLE and file.is_file() and file.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{_KEY}: {file} has more than {_MOST_BYTES >> 20} MiB; {_REMEDY}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
        tokenizer("a", add_special_tokens=True)  # some bad values show only at the first text
        largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", -1))
    # transformers raises errors of many kinds for a malformed file.
    except Exception as error:
        if not any(file for pattern in _FILES for file in Path(path).glob(pattern)):
            raise _none_in(path) from error
        reason = _damage(Path(path)) or f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"{_KEY}: transformers cannot load a tokenizer from {shown(path)} ({reason}); {_REMEDY}"
        ) from error
    # Without the files transformers makes a tokenizer of one or two special tokens and no text.
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise _none_in(path)
    # The largest id and not their number: a vocabulary may have gaps.
    if largest[1] >= embedding_size:
        raise ConfigError(
            f"{_KEY}: the tokenizer gives {shown(largest[0])} the id {largest[1]}, and the model's"
            f" embedding has {embedding_size} rows, from 0; use the model's own tokenizer or resize"
            " the model"
        )
    _check_template(tokenizer.chat_template, path=path)
    return tokenizer


def _none_in(path: str) -> NoTokenizerError:
    return NoTokenizerError(f"{_KEY}: {shown(path)} holds no tokenizer; {_REMEDY}")


def _damage(folder: Path) -> str | None:
    """What is wrong with the first file of a tokenizer that is no JSON object."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():  # a pipe would be waited for
            continue
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return f"{name}: {first_line(error)}"
        if not isinstance(content, dict):
            return f"{name} holds {shown(content)}, not a JSON object"
    return None


def _check_template(template: object, *, path: str) -> None:
    texts = list(template.values()) if isinstance(template, dict) else [template or ""]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"{_KEY}: the chat_template of {shown(path)} is {shown(template)}, not a text or named"
            " texts; mend its tokenizer_config.json"
        )
    if (longest := max((len(str(text)) for text in texts), default=0)) > _LONGEST_TEMPLATE:
        raise ConfigError(f"{_KEY}: the chat_template of {shown(path)} has {longest:,} characters")
    if lone := re.search("[\ud800-\udfff]", "".join(map(str, texts))):
        raise ConfigError(
            f"{_KEY}: the chat_template of {shown(path)} holds {shown(lone.group())}, one half of a"
            " surrogate pair, which is no text; mend its tokenizer_config.json"
        )
