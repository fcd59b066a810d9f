"""Conversations for measurements: log-normal lengths, as in common chat sets, from a seed.

Written with a byte-level BPE tokenizer trained on them, whose ChatML template marks the answers for
those who find them by `{% generation %}`.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}"
    "{%- else -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
_VOWELS = ("a", "e", "i", "o", "u", "ea", "ou")
_STARTS = ("", "b", "c", "d", "f", "g", "l", "m", "n", "p", "r", "s", "t", "st", "tr", "ch")
_ENDS = ("", "n", "r", "s", "t", "l", "nd", "st", "ng")


def conversations(num_rows: int, *, seed: int = 1) -> Iterator[list[dict[str, str]]]:
    """`num_rows` lists of messages, the same for the same seed."""
    draw = random.Random(seed)
    words = sorted({_word(draw) for _ in range(20_000)}, key=lambda word: (len(word), word))
    weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))

    def text(median: float) -> str:
        size = max(1, min(4000, round(median * math.exp(draw.gauss(0, 1)))))
        chosen = draw.choices(words, cum_weights=weights, k=size)
        return ". ".join(" ".join(chosen[at : at + 12]) for at in range(0, size, 12)) + "."

    for _ in range(num_rows):
        turns = 1 if draw.random() < 0.78 else draw.randint(2, 5)
        pairs = [(("user", 45), ("assistant", 95))] * turns
        yield [{"role": role, "content": text(size)} for pair in pairs for role, size in pair]


def write(folder: Path, *, num_rows: int) -> None:
    """Write rows.jsonl and the tokenizer's folder tok/ into `folder`."""
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for messages in conversations(num_rows):
            file.write(json.dumps({"messages": messages}) + "\n")
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=[AddedToken(token, special=True) for token in control],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (each["content"] for messages in conversations(1000) for each in messages)
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    ).save_pretrained(str(folder / "tok"))


def _word(draw: random.Random) -> str:
    syllables = min(4, 1 + int(draw.expovariate(0.9)))
    return "".join(
        draw.choice(_STARTS) + draw.choice(_VOWELS) + draw.choice(_ENDS) for _ in range(syllables)
    )
