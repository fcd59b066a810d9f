"""Answers to prompts by the current weights, on the layout of the run, with a key/value cache.

Legend: B sequences of a batch, T tokens of a forward pass, D hidden size, W columns of the padded
vocabulary on this tensor rank.

Each replica of the model answers a share of the prompts; so does each context rank, which holds all
weights. The chunks of the model are called one after the other, over pipeline stages too, and every
rank follows the same sequences: the last stage picks the tokens and sends them to all. Where
experts are shared, replicas make their passes together, some of them with nothing left to answer.

Promises: greedy tokens are those of transformers' `generate` on the same weights, but for ties
within the rounding of logits; a draw follows from seed, prompt and place. Nothing that training
reads is changed: no random state, no gradient, no parameter.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from roll_sft.base.generation import Generated, GenerationRequest
from roll_sft.base.layout import Coordinate, round_up
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.engine.attention import describe_pack
from roll_sft.engine.generation.key_value_cache import KeyValueCache
from roll_sft.engine.generation.sampling import next_tokens
from roll_sft.engine.micro_batch import Segments, segments_of
from roll_sft.engine.variations.logits import changed_logits
from roll_sft.models.shape import ModelShape

if TYPE_CHECKING:
    from roll_sft.engine.engine import Engine

CACHE_BYTES = 2 << 30  # of keys and values on a rank; training leaves more than that free
MOST_SEQUENCES = 64  # of a batch


def generate(engine: "Engine", request: GenerationRequest) -> list[Generated] | None:
    """Answers to this replica's share of the prompts; see `Decoder.answers`. Collective."""
    decoder = Decoder(engine.chunks, engine.shape, engine.config, engine.frequencies)
    # On a CPU each call of torch, down to a shape, passes through the mode of `cpu_backend`. No
    # forward pass needs it.
    with engine.inference(), torch._C.DisableTorchFunction():
        return decoder.answers(request)


@dataclass(slots=True)
class _Sequence:
    """A prompt and what was made of it so far; one without `index` fills a batch."""

    prompt: Sequence[int]
    index: int | None = None
    draws: Sequence[float] = ()
    ids: list[int] = field(default_factory=list)
    is_stopped: bool = False
    is_done: bool = False

    @property
    def last_position(self) -> int:
        """The position of the newest token."""
        return len(self.prompt) + len(self.ids) - 1


class Decoder:
    """Answers prompts with the model of this rank, which evaluates, without gradients."""

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        shape: ModelShape,
        config: RunConfig,
        frequencies: torch.Tensor,
    ) -> None:
        """`chunks` are this rank's virtual stages, `frequencies` those of `rotary_frequencies`."""
        self._chunks, self._shape, self._frequencies = chunks, shape, frequencies
        self._layout = layout = layout_of(config.parallel)
        self._device = frequencies.device
        # A prefill needs less memory than a training step over as many tokens.
        pack_tokens = max(config.train.micro_batch_tokens or 0, config.data.sequence_length)
        self._tokens_at_once = pack_tokens // layout.context_size
        self._rank = layout.coordinate(dist.get_rank())
        self._shards = layout.tensor_size if layout.sequence_parallel else 1
        self._num_replicas = layout.data_size * layout.context_size
        self._goes_together = shape.experts is not None and self._num_replicas > 1

    def answers(self, request: GenerationRequest) -> list[Generated] | None:
        """The answers to this replica's prompts on its first rank of the last stage; else None.

        Collective.
        """
        started, answers, is_late = time.monotonic(), list[Generated](), False
        for batch in self._batches(request):
            if not is_late:
                is_late = self._answer(batch, request, started=started)
            answers += [
                Generated(
                    sequence.index,
                    tuple(sequence.ids),
                    sequence.is_stopped,
                    is_late=not sequence.is_done,
                )
                for sequence in batch
                if sequence.index is not None
            ]
        is_first = self._rank.tensor_rank == 0
        return answers if is_first and self._is_last_stage else None

    @property
    def _is_last_stage(self) -> bool:
        return self._rank.pipeline_rank == self._layout.pipeline_size - 1

    def _batches(self, request: GenerationRequest) -> Iterator[list[_Sequence]]:
        """This replica's prompts, those of a like length together; as many batches on each."""
        lengths = [len(prompt) for prompt in request.prompts]
        longest = max(lengths, default=0) + request.max_new_tokens
        size = self._batch_size(longest, len(lengths))
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        replica = self._rank.data_rank * self._layout.context_size + self._rank.context_rank
        for start in range(0, len(order), size * self._num_replicas):
            of_all = order[start : start + size * self._num_replicas]
            batch = [
                _Sequence(
                    request.prompts[index],
                    index,
                    _draws(request, index),
                )
                for index in of_all[replica :: self._num_replicas]
            ]
            # Where tensor ranks cut the sequence, each needs a token of a decoding pass.
            num_sequences = round_up(max(1, len(batch)), self._shards)
            batch += [_Sequence((0,), is_done=True) for _ in range(num_sequences - len(batch))]
            yield batch

    def _batch_size(self, longest: int, num_prompts: int) -> int:
        """Sequences of up to `longest` tokens whose keys and values fit; equal on all ranks."""
        shape, layout = self._shape, self._layout
        layers = -(-shape.num_layers // layout.pipeline_size)
        groups = max(1, shape.num_key_value_heads // layout.tensor_size)
        number_bytes = self._chunks[0].config.params_dtype.itemsize
        sequence_bytes = 2 * layers * groups * shape.head_dim * number_bytes * longest
        fitting = max(1, CACHE_BYTES // sequence_bytes)
        return min(MOST_SEQUENCES, fitting, max(1, -(-num_prompts // self._num_replicas)))

    def _answer(
        self, batch: list[_Sequence], request: GenerationRequest, *, started: float
    ) -> bool:
        """Answer `batch`; whether the deadline passed before it was done."""
        length = max(len(each.prompt) for each in batch) + request.max_new_tokens
        cache = KeyValueCache(len(batch), length)
        hidden = self._prefill(batch, cache)
        while True:
            passed = self._extend(batch, hidden, request, started=started)
            goes_on, is_late = self._largest(not all(each.is_done for each in batch), passed)
            if is_late or not goes_on:
                return bool(is_late and goes_on)
            batch = self._without_done(batch, cache)
            hidden = self._decode(batch, cache)

    def _prefill(self, batch: Sequence[_Sequence], cache: KeyValueCache) -> torch.Tensor | None:
        """Read the prompts; hidden states [B, D] of their last tokens, on the last stage."""
        found = []
        packs = [*self._packs(batch)]
        (num_passes,) = self._largest(len(packs))
        for members in [*packs, *[[]] * (num_passes - len(packs))]:
            lengths = [len(batch[index].prompt) for index in members]
            num_tokens = sum(lengths)
            filling = round_up(max(1, num_tokens), self._shards) - num_tokens
            tokens = [*itertools.chain.from_iterable(batch[i].prompt for i in members)]
            tokens += [0] * filling
            bounds = [0, *itertools.accumulate([*lengths, filling] if filling else lengths)]
            segments = segments_of(
                torch.tensor(bounds, dtype=torch.int32), context_size=1, context_rank=0
            ).moved(lambda tensor: tensor.to(self._device))
            positions = np.arange(len(tokens)) - np.repeat(bounds[:-1], np.diff(bounds))
            places = self._tensor(positions)
            cache.begin(self._tensor(np.repeat(members, lengths)), places[:num_tokens])
            hidden = self._forward(self._tensor(tokens), places, segments, cache)
            if hidden is not None:
                found.append(hidden[self._tensor(np.cumsum(lengths) - 1)])
        return torch.cat(found) if found else None

    def _packs(self, batch: Sequence[_Sequence]) -> Iterator[list[int]]:
        """The sequences of `batch`, in their order, cut where a pass has enough tokens."""
        members, num_tokens = list[int](), 0
        for index, sequence in enumerate(batch):
            if members and num_tokens + len(sequence.prompt) > self._tokens_at_once:
                yield members
                members, num_tokens = [], 0
            members.append(index)
            num_tokens += len(sequence.prompt)
        yield members

    def _decode(self, batch: Sequence[_Sequence], cache: KeyValueCache) -> torch.Tensor | None:
        """Read the newest token of each sequence; hidden states [B, D] on the last stage."""
        positions = [each.last_position for each in batch]
        tokens = [(each.ids or each.prompt)[-1] for each in batch]
        places = self._tensor(positions)
        ones = (1,) * len(batch)
        bounds = torch.arange(len(batch) + 1, dtype=torch.int32, device=self._device)
        cache.begin(
            torch.arange(len(batch), device=self._device), places, num_keys=max(positions) + 1
        )
        return self._forward(
            self._tensor(tokens), places, Segments(ones, ones, bounds, bounds), cache
        )

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        segments: Segments,
        cache: KeyValueCache,
    ) -> torch.Tensor | None:
        """All layers, in turn over stages; hidden states [T, D] behind them on the last one.

        `tokens` and `positions` int64 [T]. Megatron's own schedules end in a loss, and its own
        inference needs another core attention.
        """
        description = describe_pack(segments, positions[None], frequencies=self._frequencies)
        description.cache = cache
        for chunk in self._chunks:
            if chunk.pre_process:
                hidden = chunk.embedding(input_ids=tokens[None], position_ids=positions[None])
            else:
                hidden = self._received(len(tokens))
                chunk.set_input_tensor(hidden)
            hidden = chunk.decoder(
                hidden_states=hidden, attention_mask=None, packed_seq_params=description
            )
            if not chunk.pre_process:
                chunk.set_input_tensor(None)
            if chunk.post_process:
                if self._shards > 1:
                    hidden = gather_from_sequence_parallel_region(hidden)
                return hidden[:, 0]
            dist.send(
                hidden.contiguous(),
                parallel_state.get_pipeline_model_parallel_next_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return None

    def _received(self, num_tokens: int) -> torch.Tensor:
        """The hidden states of the stage before, [T or T / TP, 1, D]."""
        config = self._chunks[0].config
        size = num_tokens // self._shards, 1, self._shape.hidden_size
        hidden = torch.empty(size, dtype=config.params_dtype, device=self._device)
        dist.recv(
            hidden,
            parallel_state.get_pipeline_model_parallel_prev_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        return hidden

    def _extend(
        self,
        batch: Sequence[_Sequence],
        hidden: torch.Tensor | None,
        request: GenerationRequest,
        *,
        started: float,
    ) -> bool:
        """Add the next token to each sequence; whether the deadline has passed."""
        told = torch.zeros(len(batch) + 1, dtype=torch.int64, device=self._device)
        if hidden is not None:
            draws = [0.0 if each.is_done else each.draws[len(each.ids)] for each in batch]
            told[:-1] = next_tokens(
                self._logits(hidden),
                torch.tensor(draws, dtype=torch.float64, device=self._device),
                request,
                vocab_size=self._shape.vocab_size,
            )
            told[-1] = time.monotonic() - started > request.deadline_s
        if self._layout.tensor_size * self._layout.pipeline_size > 1:
            dist.broadcast(
                told,
                src=self._layout.rank_of(
                    Coordinate(
                        0,
                        self._rank.context_rank,
                        self._rank.data_rank,
                        self._layout.pipeline_size - 1,
                    )
                ),
                group=parallel_state.get_model_parallel_group(),
            )
        *tokens, is_late = told.tolist()
        for sequence, token in zip(batch, tokens, strict=True):
            if not sequence.is_done:
                sequence.ids.append(token)
                sequence.is_stopped = token in request.stop_ids
                is_full = len(sequence.ids) == request.max_new_tokens
                sequence.is_done = sequence.is_stopped or is_full
        return bool(is_late)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [B, D] -> float32 [B, W]."""
        chunk: Any = self._chunks[-1]
        tied = chunk.share_embeddings_and_output_weights
        weight = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
        logits, variation = hidden @ weight.t(), self._shape.variation
        if variation is None:
            return logits.float()
        return changed_logits(logits, variation.logits_divisor, variation.logits_softcap)

    def _largest(self, *values: int) -> Sequence[int]:
        """The largest of each over all replicas, where they make their passes together."""
        if not self._goes_together:
            return values
        largest = self._tensor(values)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        return largest.tolist()

    def _without_done(self, batch: list[_Sequence], cache: KeyValueCache) -> list[_Sequence]:
        """`batch`, cut to what is left once half of it is done; so is `cache`."""
        num_left = sum(not each.is_done for each in batch)
        size = round_up(max(1, num_left), self._shards)
        if 2 * size > len(batch):
            return batch
        kept = sorted(range(len(batch)), key=lambda index: batch[index].is_done)[:size]
        cache.keep(self._tensor(kept))
        return [batch[index] for index in kept]

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=self._device)


def _draws(request: GenerationRequest, index: int) -> list[float]:
    """A number from 0 to 1 for each place in the answer to prompt `index`."""
    if request.temperature == 0:
        return [0.0] * request.max_new_tokens
    draws: list[float] = (
        np.random.default_rng([request.seed, index]).random(request.max_new_tokens).tolist()
    )
    return draws
