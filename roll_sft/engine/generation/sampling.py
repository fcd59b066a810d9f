"""The next token of each sequence, from logits that are cut over tensor ranks.

Legend: B sequences, W columns of the padded vocabulary on this tensor rank, V the vocabulary.

The likeliest token is found without gathering logits: ranks exchange their largest one. To draw
one, logits are gathered, and a number between 0 and 1 for each sequence decides by the cumulative
probabilities in the order of ids, in float64: layouts agree, but for a number that lies within the
rounding of their logits from a border.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from roll_sft.base.generation import GenerationRequest


def next_tokens(
    logits: torch.Tensor, draws: torch.Tensor, request: GenerationRequest, *, vocab_size: int
) -> torch.Tensor:
    """The tokens, int64 [B], equal on all tensor ranks.

    `logits` float32 [B, W], `draws` float64 [B] from 0 to 1, not used where `temperature` is 0.
    """
    first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[1]
    if request.temperature == 0:
        return _likeliest(logits[:, : max(0, vocab_size - first)], first=first)
    whole = torch.cat(_of_tensor_ranks(logits.contiguous()), dim=1)[:, :vocab_size]
    return drawn(whole, draws, request)


def drawn(logits: torch.Tensor, draws: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
    """Of `logits` float32 [B, V]; tokens of equal probability are kept or left out together."""
    scores = logits.double() / request.temperature
    if 0 < request.top_k < scores.shape[1]:
        least = scores.topk(request.top_k, dim=1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    probabilities = scores.softmax(dim=1)
    if request.top_p < 1:
        ordered = probabilities.sort(dim=1, descending=True).values
        before = ordered.cumsum(dim=1) - ordered
        num_kept = (before < request.top_p).sum(dim=1, keepdim=True).clamp(min=1)
        least = ordered.gather(1, num_kept - 1)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    sums = probabilities.cumsum(dim=1)
    # Of the sums above the draw the first: a token of probability 0 repeats the sum before it.
    found = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)
    return found[:, 0].clamp(max=logits.shape[1] - 1)


def _likeliest(logits: torch.Tensor, *, first: int) -> torch.Tensor:
    """The ids, int64 [B], of the largest of the real columns, which begin with id `first`."""
    if logits.shape[1] == 0:  # all of this rank's columns are padding
        best = logits.new_full((len(logits), 2), -torch.inf, dtype=torch.float64)
    else:
        largest = logits.max(dim=1)
        best = torch.stack([largest.values.double(), largest.indices.double() + first], dim=1)
    of_ranks = torch.stack(_of_tensor_ranks(best))  # [ranks, B, 2]
    # The first of equal ones, as without tensor parallelism.
    winner = of_ranks[..., 0].argmax(dim=0)
    return of_ranks[..., 1].gather(0, winner[None])[0].long()


def _of_tensor_ranks(values: torch.Tensor) -> list[torch.Tensor]:
    """`values` of every tensor rank, in their order."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return [values]
    gathered = [torch.empty_like(values) for _ in range(size)]
    dist.all_gather(gathered, values, group=parallel_state.get_tensor_model_parallel_group())
    return gathered
