"""A conversation -> texts, and the places where the supervised turns begin and end in them.

A turn begins where the rendering of the earlier messages, with the generation prompt, ends. It ends
where the rendering up to and with the turn ends. The whole text must begin with both renderings.

Some templates rewrite earlier turns once the conversation goes on: they drop reasoning from the
history. Then each supervised turn gets a text of its own, the conversation up to that turn, in
which that turn alone is trained on. This is the prompt that the model gets at inference, and each
turn is trained on once.

Promises, for a row that is not refused: every message is in the text, with its reasoning, tools and
tool calls, and the header of a supervised turn equals the generation prompt.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from roll_sft.base.errors import DataError
from roll_sft.data.chat.encoder import unmarked
from roll_sft.data.chat.render import Renderer, Rendering, Span, Turns
from roll_sft.data.chat.sample import UnusableRow, quoted
from roll_sft.data.rows.conversation import Conversation, Message


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """The characters `start:end` of the text that assistant message `message` adds to its header.

    `spans` are the parts of them that are trained on; the end-of-turn token always is. `is_blank`:
    the message holds nothing but spaces.
    """

    start: int
    end: int
    message: int
    spans: tuple[Span, ...]
    is_blank: bool


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The text of one sample, and the answers in it.

    `answers` says for each assistant message whether it is marked: trained on or, with
    `train_on=all`, left out. `calls` says for each whether it is a tool call. `turns` has the
    places of the marked ones; None if they were not looked for.
    """

    text: str
    answers: tuple[bool, ...]
    calls: tuple[bool, ...]
    turns: tuple[AnswerSpan, ...] | None = None


class _RewrittenError(Exception):
    """The whole text does not begin with the rendering of its first messages."""


class TurnFinder:
    """Finds the turns of conversations with one template. `train_on` is as in the configuration."""

    def __init__(self, renderer: Renderer, *, train_on: str) -> None:
        self._renderer = renderer
        self._train_on = train_on
        self._has_prompt = False

    def singled_out(self, messages: Sequence[Message]) -> list[int]:
        """Return the assistant messages to be trained on, or with `train_on=all` to be left out."""
        if self._train_on == "all":
            return [i for i, m in enumerate(messages) if m.role == "assistant" and not m.train]
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if self._train_on == "last_assistant":
            answers = answers[-1:]
        return [i for i in answers if messages[i].train]

    def whole(self, row: Conversation, text: str) -> RenderedChat:
        """Return `text` as the one sample of `row`, without the places of its turns."""
        return _text(text, row.messages, self.singled_out(row.messages))

    def find(self, row: Conversation) -> list[RenderedChat]:
        """Return the texts of `row` with the places of their turns, or raise `UnusableRow`.

        Raises `DataError` if the template cannot be used with any conversation.
        """
        renderer, messages = self._renderer, row.messages
        renderer.check_expressible(row)
        turns, wanted = renderer.turns(messages), self.singled_out(messages)
        last = len(messages) - 1
        if messages[last].role == "assistant" and (self._train_on == "all" or last in wanted):
            turns[last] = renderer.answer(messages[last])
        rendering = renderer.render(turns, tools=row.tools, add_generation_prompt=False)
        for index, message in enumerate(messages):
            if message.role != "assistant":
                _check_present(message, index=index, text=rendering.text)
            elif self._train_on == "all":
                _check_answer(message, index=index, text=rendering.text)
            elif index not in wanted:
                _check_context(message, index=index, text=rendering.text)
        if row.tools:
            from roll_sft.data.chat.tool_rendering import check_tools

            check_tools(row.tools, text=rendering.text)
        # Earlier answers are rendered as history, which may differ from the form of a new answer.
        if self._train_on != "all" and any(
            renderer.answer(messages[index]) != turns[index] for index in wanted
        ):
            return [self._up_to(row, turns, index) for index in wanted]
        try:
            places = [self._place(row, turns, rendering, index) for index in wanted]
            return [_text(rendering.text, messages, wanted, places)]
        except _RewrittenError as error:
            if self._train_on == "all":
                raise UnusableRow(str(error), is_of_template=True) from error
            return [self._up_to(row, turns, index) for index in wanted]

    def _up_to(self, row: Conversation, turns: Turns, index: int) -> RenderedChat:
        """Return the conversation up to message `index`, which alone is trained on."""
        messages = row.messages[: index + 1]
        turns = [*turns[:index], self._renderer.answer(messages[index])]
        rendering = self._renderer.render(turns, tools=row.tools, add_generation_prompt=False)
        try:
            place = self._place(row, turns, rendering, index)
        except _RewrittenError as error:
            reason = str(error)
            if self._renderer.opens_think:
                from roll_sft.data.chat.reasoning import closed_to

                reason = closed_to(messages[index], self._renderer.think, index=index)
            raise UnusableRow(reason, is_of_template=True) from error
        return _text(rendering.text, messages, [index], [place])

    def _place(self, row: Conversation, turns: Turns, whole: Rendering, index: int) -> AnswerSpan:
        renderer, text = self._renderer, whole.text
        render = renderer.render
        before = render(turns[:index], tools=row.tools, add_generation_prompt=True).text
        upto = text
        if index < len(turns) - 1:
            upto = render(turns[: index + 1], tools=row.tools, add_generation_prompt=False).text
        for beginning in (before, upto):
            if not text.startswith(beginning):
                raise _RewrittenError(_rewritten(text, beginning=beginning, index=index))
        message = row.messages[index]
        start, end = len(before), len(upto)
        written = text[start:end]
        tail = renderer.prompt_tail
        _check_answer(
            message, index=index, text=written, before=tail if before.endswith(tail) else ""
        )
        spans = _supervised(start, end, marks=whole.marks)
        # After the generation prompt some templates write more before the answer (a think block).
        # Without a generation prompt that text is the header, unless a mark says otherwise.
        if not self._has_prompt and not written.lstrip().startswith(_first_words(message)):
            plain = render(turns[:index], tools=row.tools, add_generation_prompt=False).text
            self._has_prompt = before != plain
            if not self._has_prompt and spans == ((start, end),):
                raise DataError(
                    f"the chat template ignores add_generation_prompt and writes {quoted(written)} "
                    f"before an answer, so the header cannot be told from the answer; add "
                    f"{{% if add_generation_prompt %}} with the header to the tokenizer's template"
                )
        is_blank = not (message.content.strip() or message.reasoning or message.tool_calls)
        return AnswerSpan(start, end, index, spans, is_blank=is_blank)


def _text(
    text: str,
    messages: Sequence[Message],
    wanted: Sequence[int],
    turns: Sequence[AnswerSpan] | None = None,
) -> RenderedChat:
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    return RenderedChat(
        text,
        answers=tuple(index in wanted for index in answers),
        calls=tuple(bool(messages[index].tool_calls) for index in answers),
        turns=None if turns is None else tuple(turns),
    )


def _supervised(start: int, end: int, *, marks: Iterable[Span]) -> tuple[Span, ...]:
    """Return the supervised parts of a turn: those that the template marks, or all of it."""
    inside = [(max(start, left), min(end, right)) for left, right in marks]
    inside = [span for span in inside if span[0] < span[1]]
    return tuple(inside) or ((start, end),)


def _first_words(message: Message) -> str:
    return message.content.strip() or unmarked(message.reasoning).strip()


def _check_present(message: Message, *, index: int, text: str, before: str = "") -> None:
    """Raise `UnusableRow` if the template left out or changed the content of the message.

    Spaces may differ, and the content may be written as JSON. `before` is the end of the generation
    prompt, which stands before `text`: the message may begin there, but must not end there.
    """
    content = message.content
    if _holds(text, content):
        return
    if before and not _holds(before, content) and _holds(before + text, content):
        return
    raise UnusableRow(
        f"the chat template drops or rewrites the text of message {index} ({message.role})",
        is_of_template=True,
    )


def _check_context(message: Message, *, index: int, text: str) -> None:
    """As `_check_present`, for an unsupervised answer: earlier reasoning may be dropped."""
    answer = message.content.rpartition("</think>")[2]
    if not _holds(text, answer):
        _check_present(message, index=index, text=text)
    _check_calls(message, index=index, text=text)


def _check_answer(message: Message, *, index: int, text: str, before: str = "") -> None:
    _check_present(message, index=index, text=text, before=before)
    if not _holds(text, message.reasoning):
        raise UnusableRow(
            f"the chat template drops or rewrites the reasoning of message {index}",
            is_of_template=True,
        )
    _check_calls(message, index=index, text=text)


def _check_calls(message: Message, *, index: int, text: str) -> None:
    if message.tool_calls:
        from roll_sft.data.chat.tool_rendering import check_calls

        check_calls(message, index=index, text=text)


def _holds(text: str, part: str) -> bool:
    """Whether `part` stands in `text`, but for spaces, as it is or as a JSON string."""
    if part in text:
        return True
    closed = "".join(text.split())
    return any("".join(form.split()) in closed for form in forms(part))


def forms(part: str) -> Iterator[str]:
    """The ways in which templates write a text: as it is, or with `tojson`, in ASCII or not."""
    yield part
    for ensure_ascii in (False, True):
        yield json.dumps(part, ensure_ascii=ensure_ascii)[1:-1]


def _rewritten(text: str, *, beginning: str, index: int) -> str:
    shorter = min(len(text), len(beginning))
    place = next((at for at in range(shorter) if text[at] != beginning[at]), shorter)
    return (
        f"the chat template rewrites earlier turns, so the answer in message {index} has no fixed "
        f"place: it writes {quoted(beginning[place:])} up to that turn and "
        f"{quoted(text[place:])} once the conversation goes on"
    )
