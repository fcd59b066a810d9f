"""The prompts of `evaluation.prompts`, rendered and tokenized; and the check of `metric_fn`.

Runs where a run is prepared. Training reads what is written here as plain values.
"""

import importlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from roll_sft.base.errors import ConfigError, DataError, first_line
from roll_sft.base.text import shown
from roll_sft.config.evaluation import PromptSource
from roll_sft.config.schema import RunConfig
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.generation_prompt import generation_prompt
from roll_sft.data.chat.sample import UnusableRow
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.rows.conversation import BadRow, Conversation, Document, Message
from roll_sft.data.rows.questions import PromptRows, question_and_reference
from roll_sft.data.rows.sources import read_rows
from roll_sft.models.shape import ModelShape


def prepared_prompts(
    config: RunConfig, shape: ModelShape, chat: ChatTokenizer, keys: ColumnKeys
) -> list[dict[str, Any]]:
    """Each prompt as {prompt, text, ids, reference}, in the order of `evaluation.prompts`.

    `prompt` is the last user message, `text` what the model reads, `ids` int tokens of it,
    `reference` the answer of a row or None. A plain text, or a message for a tokenizer without a
    chat template, is continued as it stands. Raises `ConfigError` and `DataError`.
    """
    if config.evaluation.metric_fn is not None:
        imported_metric(config.evaluation.metric_fn)
    found = []
    for index, entry in enumerate(config.evaluation.prompts):
        where = f"evaluation.prompts[{index}]"
        if isinstance(entry, PromptSource):
            of_source = list(_of_source(entry, chat, keys, where=where))
            if not of_source:
                raise DataError(f"{where}: {entry.path} has no rows; give a file with prompts")
            found += of_source
        else:
            question = Conversation((Message("user", entry),), row=0, line=1)
            found.append((where, _asked(question, None, chat, where=where)))
    most = shape.max_position_embeddings
    if shape.variation is not None and shape.variation.longest is not None:
        most = min(most, shape.variation.longest)
    for where, each in found:
        length, new = len(each["ids"]), config.evaluation.max_new_tokens
        if length + new > most:
            raise ConfigError(
                f"{where}: {length} tokens of the prompt and evaluation.max_new_tokens {new} exceed"
                f" the {most} positions of the model; shorten the prompt, or lower the other"
            )
    return [each for _, each in found]


def imported_metric(name: str) -> Any:
    """The function `evaluation.metric_fn`. Raises `ConfigError` where it cannot be imported."""
    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ConfigError(
            f"evaluation.metric_fn: {shown(name)} cannot be imported: {first_line(error)}; correct"
            " it, or put its folder into PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(
            f"evaluation.metric_fn: {shown(name)} is {type(found).__name__}, not a function; name"
            " one of its module"
        )
    return found


def _of_source(
    entry: PromptSource, chat: ChatTokenizer, keys: ColumnKeys, *, where: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = read_rows(entry.path or "", keys, split=entry.split, left_aside=set(), reader=PromptRows)
    for place, row in islice(rows, entry.samples):
        at = f"{where}: {place}"
        if isinstance(row, BadRow):
            raise DataError(f"{at}: {row.reason}")
        if isinstance(row, Document):
            yield at, _continued(row, chat)
            continue
        before, reference = question_and_reference(row)
        question = Conversation(
            before, row.row, row.line, tools=row.tools, template_kwargs=row.template_kwargs
        )
        yield at, _asked(question, reference, chat, where=at)


def _asked(
    row: Conversation, reference: str | None, chat: ChatTokenizer, *, where: str
) -> dict[str, Any]:
    asked = [message.content for message in row.messages if message.role == "user"]
    if not asked:
        raise DataError(f"{where}: no user message; a prompt needs one")
    if chat.template is None:
        document = Document(asked[-1], row.row, row.line)
        return {**_continued(document, chat), "reference": reference}
    try:
        text, ids = generation_prompt(chat, row)
    except UnusableRow as error:
        raise DataError(f"{where}: {error}") from error
    return {"prompt": asked[-1], "text": text, "ids": ids, "reference": reference}


def _continued(row: Document, chat: ChatTokenizer) -> dict[str, Any]:
    text, ids = generation_prompt(chat, row)
    return {"prompt": text, "text": text, "ids": ids, "reference": None}
