"""Samples that are cut to `data.sequence_length`."""

from roll_sft.data.chat.sample import TokenizedSample


def cut_sample(sample: TokenizedSample, limit: int) -> TokenizedSample:
    """At most the first `limit` tokens of `sample`, up to a span that may not be cut.

    No token is put in place of those that are lost, least of all an end of turn.
    """
    stop = limit
    for start, end in sorted(sample.atomic, reverse=True):  # a span may lie in another
        if start < stop < end:
            stop = start
    label_mask = sample.label_mask[:stop].copy()
    label_mask[-1:] = 0  # the token that it predicts is gone
    return TokenizedSample(sample.token_ids[:stop], label_mask)
