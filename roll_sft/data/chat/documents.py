"""Documents -> samples: rows of plain text, encoded without a template.

A sample begins with the tokens that the tokenizer puts before a text, ends with the end-of-text
token, and is trained on as a whole.
"""

from collections.abc import Iterable

import numpy as np

from roll_sft.base.errors import DataError
from roll_sft.data.chat.encoder import Encoder, EncoderFacts
from roll_sft.data.chat.prepared import PlannedText
from roll_sft.data.chat.sample import TokenizedSample
from roll_sft.data.chat.turns import RenderedChat
from roll_sft.data.rows.conversation import Document


def planned_document(
    row: Document, encoder: Encoder, facts: EncoderFacts
) -> tuple[PlannedText, TokenizedSample | None]:
    """The text to encode, and its sample already where the text spells control tokens.

    Raises `DataError` for a tokenizer that does not know how a text ends.
    """
    if facts.end_of_text is None:
        raise DataError(
            "the tokenizer has no eos_token, so a text would have no end; name one in its "
            "tokenizer_config.json"
        )
    text = RenderedChat(row.text, answers=(), calls=())
    if not encoder.holds_control_text(row.text):
        return PlannedText(text, by_ids=True), None
    ids = encoder.control_text.encode_renamed(row.text).ids
    return PlannedText(text, by_ids=False), document_sample(ids, facts)


def document_sample(ids: Iterable[int], facts: EncoderFacts) -> TokenizedSample:
    """The sample of a text with these `ids`."""
    whole = np.array([*facts.first_ids, *ids, facts.end_of_text], np.int32)
    label_mask = np.ones(whole.size, np.uint8)
    label_mask[-1] = 0
    return TokenizedSample(whole, label_mask)
