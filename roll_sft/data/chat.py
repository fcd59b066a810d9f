"""Conversation -> token ids and the mask of what is trained on, by the tokenizer's own template.

How the mask is made. The template renders the whole conversation once, and that text is encoded
once. Where an assistant turn begins and ends in it is found by rendering the messages before the
turn (with the generation prompt) and the messages up to it; both must be beginnings of the whole
text, or the template rewrites earlier turns and the row is refused. Character offsets then carry
the two places over to the tokens.

What is promised, or the row is refused with a reason:
- supervised are exactly the tokens of each assistant turn after its header, up to and with its
  end-of-turn token, once; not the line break after it, and nothing of any other turn;
- no token is partly inside. A token made across the border between header and answer would be one
  that no model is ever asked for, since at inference the header comes as tokens of its own;
- every message is in the rendered text, and only the template writes control tokens;
- `label_mask[t]` speaks about the prediction of token t + 1: the shift happens here, nowhere else.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import jinja2
import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from roll_sft.data.conversation import Conversation, Document, Message
from roll_sft.errors import DataError

# Part of the fingerprint: raise it when the same conversation gives other ids or another mask.
_VERSION = 2
# How tokenizers name the end of a text, where `eos_token` may be the end of a turn.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_CONTEXT_CHARACTERS = 12


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedSample:
    """What one sample of a row is: `token_ids` int32 [T] and `label_mask` uint8 [T].

    `label_mask[t]` is 1 where token t predicts token t + 1 and that is trained on; 0 at the end.
    `atomic`: spans of tokens (start, stop) that may not be cut through, as a tool call.
    """

    token_ids: NDArray[np.int32]
    label_mask: NDArray[np.uint8]
    atomic: tuple[tuple[int, int], ...] = ()


class UnusableRow(Exception):  # noqa: N818 - it says what the row is, not that something failed
    """A conversation that this tokenizer and template cannot turn into an exact sample."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """The characters `start:end` of the text that an assistant message adds after its header.

    `message` is its index, and `is_blank` says that its content is but spaces.
    """

    start: int
    end: int
    message: int
    is_blank: bool


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation as text, with its assistant turns in order."""

    text: str
    turns: tuple[_Turn, ...]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Token ids of a text, and the characters `starts[t]:ends[t]` that token t stands for.

    The tokens of one character share its place, so a border between two characters lies inside a
    token only if that token covers a part of both.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]


class ChatTokenizer:
    """Turns conversations into samples with one tokenizer and the chat template it carries.

    `fingerprint` (hexadecimal SHA-256) changes with anything that changes a sample: vocabulary,
    merges, normalisation, added tokens, template, and the rules of this module.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        train_on: str = "assistant",
    ) -> None:
        """`template` is Jinja text in place of the tokenizer's own; `train_on` as `data.train_on`.

        Raise `DataError` if `tokenizer` reports no character offsets or has no chat template.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise DataError(
                f"tokenizer {type(tokenizer).__name__}: is not a fast one and reports no character "
                f"offsets, which the loss mask needs; use a model folder with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        assert train_on == "assistant", f"train_on {train_on!r} is not built"
        self.template = _chat_template(tokenizer) if template is None else template
        self._backend = _plain_backend(tokenizer)
        control_tokens = _control_tokens(tokenizer)
        self._control_ids = frozenset(control_tokens.values())
        # The longest first: one control token may begin with another.
        by_length = sorted(control_tokens, key=lambda text: (-len(text), text))
        self._control_text = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        self._first_ids = tokenizer("", add_special_tokens=True).input_ids[:1]
        if self._first_ids != [tokenizer.bos_token_id]:
            self._first_ids = []
        self._end_of_text = _end_of_text(tokenizer, control_tokens)
        parts = (
            _VERSION,
            self._backend.to_str(),
            self.template,
            train_on,
            tokenizer.special_tokens_map,
            sorted(control_tokens.items()),
        )
        described = json.dumps(parts, sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(described.encode("utf-8")).hexdigest()

    def tokenize(self, row: Conversation | Document) -> list[TokenizedSample]:
        """Return the samples of one row, or raise `UnusableRow`; see `tokenize_many`."""
        result = self.tokenize_many([row])[0]
        if isinstance(result, UnusableRow):
            raise result
        return result

    def tokenize_many(
        self, rows: Sequence[Conversation | Document]
    ) -> list[list[TokenizedSample] | UnusableRow]:
        """Return for each row its samples, or why it has none (not raised).

        A document is encoded without the template, ends with the end-of-text token, and is trained
        on as a whole. Encodes all rows together, which uses all cores. Raises `DataError` if the
        template cannot be used with any conversation: broken syntax, or no end-of-turn token.
        """
        rendered: list[_Rendered | str | UnusableRow] = []
        for row in rows:
            try:
                rendered.append(self._render(row))
            except UnusableRow as error:
                rendered.append(error)
        texts = [
            each.text if isinstance(each, _Rendered) else each
            for each in rendered
            if not isinstance(each, UnusableRow)
        ]
        # The template writes what begins a text; adding it again would double it.
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        results: list[list[TokenizedSample] | UnusableRow] = []
        for each in rendered:
            if isinstance(each, UnusableRow):
                results.append(each)
                continue
            try:
                results.append([self._sample(each, encoding=next(encodings))])
            except UnusableRow as error:
                results.append(error)
        return results

    def _document(self, document: Document) -> str:
        if found := self._control_text.search(document.text):
            raise UnusableRow(
                f"the text holds '{found.group()}', which the tokenizer reads as a control token; "
                f"reword or remove it"
            )
        if self._end_of_text is None:
            raise DataError(
                "the tokenizer has no eos_token, so a text would have no end; name one in its "
                "tokenizer_config.json"
            )
        return document.text

    def _render(self, row: Conversation | Document) -> _Rendered | str:
        if isinstance(row, Document):
            return self._document(row)
        messages = row.messages
        for index, message in enumerate(messages):
            if message.reasoning or message.tool_calls or row.tools or not message.train:
                raise UnusableRow(
                    f"message {index} ({message.role}) has reasoning, tools, calls or train=false, "
                    f"which is not available in this version; remove them"
                )
        self._refuse_control_text(messages)
        text = self._apply(messages, add_generation_prompt=False)
        turns: list[_Turn] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                _check_present(message, index=index, text=text)
                continue
            if index == 0:
                raise UnusableRow(
                    "the conversation begins with an assistant message, which answers nothing; "
                    "begin with a user message"
                )
            turns.append(self._turn(messages, index=index, text=text))
        return _Rendered(text=text, turns=tuple(turns))

    def _turn(self, messages: Sequence[Message], *, index: int, text: str) -> _Turn:
        before = self._apply(messages[:index], add_generation_prompt=True)
        last = index == len(messages) - 1
        upto = text if last else self._apply(messages[: index + 1], add_generation_prompt=False)
        for beginning in (before, upto):
            if not text.startswith(beginning):
                raise UnusableRow(_rewritten(text, beginning=beginning, index=index))
        content = messages[index].content
        written = text[len(before) : len(upto)]
        _check_present(messages[index], index=index, text=written)
        # Some templates (a think block) write more before the answer, after the generation prompt.
        # Without such a prompt, what they write there is the header.
        if not written.lstrip().startswith(content.strip()) and before == self._apply(
            messages[:index], add_generation_prompt=False
        ):
            raise DataError(
                f"the chat template ignores add_generation_prompt and writes {_quoted(written)} "
                f"before an answer, so the header cannot be told from the answer; add "
                f"{{% if add_generation_prompt %}} with the header to the tokenizer's template"
            )
        return _Turn(len(before), len(upto), message=index, is_blank=not content.strip())

    def _refuse_control_text(self, messages: Sequence[Message]) -> None:
        for index, message in enumerate(messages):
            if found := self._control_text.search(message.content):
                raise UnusableRow(
                    f"message {index} ({message.role}) holds the text '{found.group()}', which the "
                    f"tokenizer reads as a control token; reword or remove it"
                )

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is broken at its line {error.lineno}: {error.message}; mend "
                f"the tokenizer's template or use another tokenizer"
            ) from error
        except (jinja2.TemplateError, TypeError) as error:
            raise UnusableRow(f"the chat template refuses the conversation: {error}") from error
        assert isinstance(text, str), f"a rendered conversation is a {type(text).__name__}"
        return text

    def _sample(self, rendered: _Rendered | str, *, encoding: Encoding) -> TokenizedSample:
        if isinstance(rendered, str):
            ids = np.array([*self._first_ids, *encoding.ids, self._end_of_text], np.int32)
            label_mask = np.ones(ids.size, np.uint8)
            label_mask[-1:] = 0
            return TokenizedSample(ids, label_mask)
        offsets: list[tuple[int, int]] = encoding.offsets
        tokens = _Encoded(
            encoding.ids, starts=[start for start, _ in offsets], ends=[end for _, end in offsets]
        )
        if any(left > right for left, right in pairwise(tokens.starts)):
            raise UnusableRow(
                "the tokenizer reports character offsets that go backwards, so the answer cannot "
                "be told from its context; normalise the text of the row (NFC) beforehand"
            )
        label_mask = np.zeros(len(tokens.ids), np.uint8)
        for turn in rendered.turns:
            # First, since a template without an end is at fault whatever the row holds.
            final = self._end_of_turn(rendered.text, turn=turn, tokens=tokens)
            first = bisect_left(tokens.starts, turn.start)
            if first > 0 and tokens.ends[first - 1] > turn.start:
                raise UnusableRow(_straddling(rendered.text, turn=turn))
            # Shifted by one: the token before is the one that predicts. Nothing predicts the first.
            label_mask[max(first, 1) - 1 : final] = 1
        return TokenizedSample(np.array(tokens.ids, np.int32), label_mask)

    def _end_of_turn(self, text: str, *, turn: _Turn, tokens: _Encoded) -> int:
        """Return the index of the control token that ends the turn.

        It is the first control token after the answer's last visible text. Others may follow, with
        spaces between: a template may close the whole text with one more.
        """
        found: list[int] = []
        first, stop = bisect_left(tokens.starts, turn.start), bisect_left(tokens.starts, turn.end)
        for token in reversed(range(first, stop)):
            if tokens.ids[token] in self._control_ids:
                found.append(token)
            elif text[tokens.starts[token] : min(tokens.ends[token], turn.end)].strip():
                break
        if not found:
            raise DataError(
                f"the chat template ends an answer without an end-of-turn token (it writes "
                f"{_quoted(text[turn.start : turn.end], end=True)}), so a model would never learn "
                f"to stop; end the assistant turn with {{{{ eos_token }}}} in its template"
            )
        if len(found) > 1 and turn.is_blank:
            raise UnusableRow(
                f"message {turn.message} (assistant) holds no text, so its end-of-turn token "
                f"cannot be told from its header; remove the message"
            )
        return found[-1]


def _chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the template as text, the default one if the tokenizer has several."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template or ())) or "none"
        raise DataError(
            f"the tokenizer has no default chat template (found: {names}); give it one, "
            f"or give the tokenizer of an instruction-tuned model with model.tokenizer_path"
        ) from None


def _plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of the tokenizer's backend that only encodes.

    A copy, because padding and truncation are state that calls of the original leave behind.
    Without a post-processor, because it could add tokens, and the byte-level one can trim spaces
    from the offsets: a token that holds a space would then not cover it.
    """
    backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = None
    return backend


def _control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return text -> id of the tokens that steer a model and never come from ordinary text."""
    tokens = {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    tokens.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    # A vocabulary may name its unknown token: ordinary text does come to that one.
    if tokenizer.unk_token not in (None, tokenizer.eos_token, tokenizer.bos_token):
        tokens.pop(tokenizer.unk_token, None)
    return tokens


def _end_of_text(
    tokenizer: PreTrainedTokenizerFast, control_tokens: Mapping[str, int]
) -> int | None:
    """Return the id that ends a document: chat models have another end-of-sequence token."""
    named = (control_tokens[text] for text in _END_OF_TEXT if text in control_tokens)
    return next(named, tokenizer.eos_token_id)


def _check_present(message: Message, *, index: int, text: str) -> None:
    """Raise if the template left out or changed what the message says, but for spaces."""
    content = message.content
    if content in text or "".join(content.split()) in "".join(text.split()):
        return
    raise UnusableRow(
        f"the chat template drops or rewrites the text of message {index} ({message.role}); change "
        f"the message, or use a tokenizer whose template writes it as it stands"
    )


def _rewritten(text: str, *, beginning: str, index: int) -> str:
    shorter = min(len(text), len(beginning))
    place = next((at for at in range(shorter) if text[at] != beginning[at]), shorter)
    return (
        f"the chat template rewrites earlier turns, so the answer in message {index} has no fixed "
        f"place: it writes {_quoted(beginning[place:])} up to that turn and "
        f"{_quoted(text[place:])} once the conversation goes on; use single-turn rows or a "
        f"tokenizer with another template"
    )


def _straddling(text: str, *, turn: _Turn) -> str:
    return (
        f"one token spans the end of the header {_quoted(text[: turn.start], end=True)} and the "
        f"beginning of the answer {_quoted(text[turn.start :])} in message {turn.message}; change "
        f"the beginning of the answer, or the end of the header in its template"
    )


def _quoted(text: str, *, end: bool = False) -> str:
    cut = text[-_CONTEXT_CHARACTERS:] if end else text[:_CONTEXT_CHARACTERS]
    return ascii(cut) if cut else "nothing"
