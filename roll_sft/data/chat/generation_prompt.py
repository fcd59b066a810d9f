"""What a model reads before it answers: a conversation with the generation prompt, as tokens.

Promise: the ids are those that stand before an answer in a sample of `data/chat/chat.py`.
"""

from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.encoder import Encoder, unmarked
from roll_sft.data.chat.render import Renderer
from roll_sft.data.chat.sample import UnusableRow
from roll_sft.data.rows.conversation import Conversation, Document


def generation_prompt(chat: ChatTokenizer, row: Conversation | Document) -> tuple[str, list[int]]:
    """Text and token ids of `row`, whose last message is not the model's, or of a plain text.

    Raises `UnusableRow` where the template refuses the conversation, `DataError` without one.
    """
    if isinstance(row, Document):
        return row.text, [*chat.recipe.encoder.first_ids, *_ids(row.text, chat.encoder)]
    renderer, encoder = chat.prepared_for(row).renderer, chat.encoder
    text = _rendered(row, renderer)
    if not encoder.spells_control(row):
        return text, encoder.encode([text])[0].tolist()
    control = encoder.control_text
    marked = _rendered(control.marked(row), renderer)
    if unmarked(marked) != text:
        raise UnusableRow(
            "the row spells a control token where the chat template looks at the text, so the"
            " two cannot be told apart; reword or remove it"
        )
    return text, control.encode_renamed(control.renamed(marked)).ids


def _ids(text: str, encoder: Encoder) -> list[int]:
    """The ids of a plain text."""
    if encoder.holds_control_text(text):
        return encoder.control_text.encode_renamed(text).ids
    ids: list[int] = encoder.encode([text])[0].tolist()
    return ids


def _rendered(row: Conversation, renderer: Renderer) -> str:
    turns = renderer.turns(row.messages)
    return renderer.render(turns, tools=row.tools, add_generation_prompt=True).text
