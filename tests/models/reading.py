"""What transformers, in whatever version, reads from model folders: run alone or imported.

    python tests/models/reading.py RESULTS FOLDER...

Imports nothing of the project, so it runs where only transformers is.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, __version__

TEXTS = ("It's 12345 -  they'LL\n\n  pay \u00e9tude \u654f\u6377 <|im_end|> x", "<s> Hi </s>", "")
CHAT = [
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "Eight."},
]


class Forced(LogitsProcessor):
    """Makes a model say one token, and nothing else ever."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = 0.0
        return forced


def read(folder: str) -> dict[str, Any]:
    """Ids of texts and of a conversation, logits, and how many tokens an ended turn takes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.arange(24)[None] * 11 % 400
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False)
    (end_of_turn,) = tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0]
        generated = model.generate(
            ids, max_new_tokens=5, do_sample=False, logits_processor=[Forced(end_of_turn)]
        )
    return {
        "ids": [tokenizer(text)["input_ids"] for text in (*TEXTS, chat)],
        "chat": chat,
        "text": tokenizer.decode(tokenizer(TEXTS[0])["input_ids"]),
        "special": sorted(map(str, tokenizer.all_special_tokens)),
        "length": len(tokenizer),
        "stops": model.generation_config.eos_token_id,
        "num_generated": generated.shape[1] - ids.shape[1],
        "dtype": str(model.dtype),
        "logits": logits,
    }


if __name__ == "__main__":
    torch.save({"version": __version__, **{name: read(name) for name in sys.argv[2:]}}, sys.argv[1])
    Path(sys.argv[1]).with_suffix(".done").touch()
