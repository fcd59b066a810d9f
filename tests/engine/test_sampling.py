"""The draw of a token, beside the processors of logits of transformers."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from roll_sft.base.generation import GenerationRequest
from roll_sft.engine.generation.sampling import drawn

ROWS, VOCABULARY = 6, 50


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 200])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_shares_of_draws_are_the_probabilities_of_transformers(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 2, (ROWS, VOCABULARY)))
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    wanted = processors(torch.zeros(ROWS, 1, dtype=torch.long), logits.clone()).softmax(1)
    request = GenerationRequest((), (), 1, temperature=temperature, top_p=top_p, top_k=top_k)
    # Draws at even distances: a token's share of them is its probability, up to one draw.
    draws = torch.arange(0, 1, 1 / 2048, dtype=torch.float64)
    for row in range(ROWS):
        tokens = drawn(logits[row].expand(len(draws), -1), draws, request)
        shares = torch.bincount(tokens, minlength=VOCABULARY) / len(draws)
        assert float((shares - wanted[row]).abs().max()) < 1.01 / len(draws)
        assert set(tokens.tolist()) <= set(wanted[row].nonzero()[:, 0].tolist())


def test_tokens_of_equal_probability_stay_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0]])
    draws = torch.arange(0, 1, 1 / 64, dtype=torch.float64)
    request = GenerationRequest((), (), 1, temperature=1.0, top_k=2)
    tokens = drawn(logits.expand(64, -1), draws, request)
    assert set(tokens.tolist()) == {0, 1, 2, 3}
    assert drawn(logits, torch.tensor([1.0 - 2**-53], dtype=torch.float64), request).item() == 3
