"""`Engine`: one rank's `train_step`, `evaluate` and `save`; the only caller of mcore's schedules.

Assumes it runs inside `process_groups`. All ranks make the same calls in the same order; each gets
the micro-batches of its data rank. Promises: the loss and the gradient are those of the global
batch, whatever the layout; a call returns metrics on the reporting rank and None elsewhere; within
a step nothing of ours waits for the device before its end, which reads the norm and the loss.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from roll_sft.base.metrics import EvalMetrics, StepMetrics
from roll_sft.checkpoint import tensors
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.data.steps.plan import RankWork
from roll_sft.data.tokens.cache import TokenData, TokenSet
from roll_sft.engine import build
from roll_sft.engine.attention import describe_pack
from roll_sft.engine.attention_kernels import Heads, choose_kernel
from roll_sft.engine.fused import add_in_products, choose_compile
from roll_sft.engine.loss import loss_arguments
from roll_sft.engine.micro_batch import BuildAhead, Indices, MicroBatch, build_micro_batches
from roll_sft.engine.optimizer import (
    build_optimizer,
    gradient_norm,
    make_optimizer_state,
    optimizer_step,
    update,
)
from roll_sft.engine.process_groups import seed_step
from roll_sft.engine.state import RankState, check_written, rank_state
from roll_sft.models.source import ModelSource

if TYPE_CHECKING:
    from roll_sft.checkpoint.background import BackgroundWriter
    from roll_sft.engine.moe.experts import Experts
    from roll_sft.engine.recipes.recipe import Recipe


class Readout:
    """Numbers on their way from the device; reading waits for them and for nothing queued later."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)  # pinned memory, from a GPU
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[float]:
        """The values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


class Engine:
    """A rank's model, optimizer and data. Not thread-safe."""

    def __init__(
        self,
        config: RunConfig,
        *,
        source: ModelSource,
        data: TokenData,
        checkpoint: Path | None = None,
    ) -> None:
        """Begin with the weights of `source`, or with the state in `checkpoint`; collective.

        Raises `ConfigError` for a kernel or a compiler that does not work, `CheckpointError` for
        weights that cannot be read or are not finite.
        """
        self.config = config
        self._layout = layout_of(config.parallel)
        self._rank = self._layout.coordinate(dist.get_rank())
        self.shape = source.shape
        self._data = data
        self._device = torch.device(torch.cuda.current_device())
        torch.use_deterministic_algorithms(config.deterministic)
        self._transformer = build.transformer_config(
            source.shape,
            self._layout,
            config=config,
            is_compiled=choose_compile(config.model.compile, device=self._device),
        )
        add_in_products(self._transformer, device=self._device)
        self.frequencies = build.rotary_frequencies(source.shape)
        kernel = choose_kernel(
            config.model.attention_backend,
            device=self._device,
            dtype=build.DTYPES[config.model.dtype],
            heads=Heads(
                source.shape.num_attention_heads // self._layout.tensor_size,
                max(1, source.shape.num_key_value_heads // self._layout.tensor_size),
                source.shape.head_dim,
                source.shape.variation,
            ),
        )
        self.chunks = build.build_model(source.shape, self._transformer, kernel=kernel)
        if checkpoint is None or config.trains_part:
            build.load_weights(self.chunks, source.family, source.shape, source=source.tensors)
        else:
            build.clear_weights(self.chunks)
        self._recipe = self._prepare(source, is_new=checkpoint is None)
        self._experts = self._mark_experts(source)
        self._wrapped = build.wrap_model(self.chunks, self._transformer, parallel=config.parallel)
        self._gathers_ahead = build.overlaps(config.parallel)[1]
        if self._gathers_ahead:
            from roll_sft.engine.overlap import chain_stages

            chain_stages(self._wrapped)
        self.optimizer = build_optimizer(
            config, self._wrapped, self._recipe and self._recipe.overrides
        )
        self._is_reporter = dist.get_rank() == self._layout.reporting_rank
        self.on_micro_batch: Callable[[], object] = bool  # called as each one begins
        self._background: BackgroundWriter | None = None
        if config.checkpoint.async_save:
            from roll_sft.checkpoint import background

            self._background = background.BackgroundWriter()
        torch.cuda.reset_peak_memory_stats()
        self._ahead = BuildAhead(lambda indices: self.build(self._data.train, indices))
        if checkpoint is not None:
            self._load(checkpoint)

    def _prepare(self, source: ModelSource, *, is_new: bool) -> "Recipe | None":
        """What the run does beside a plain full fine-tune, if anything."""
        config, layers, data = self.config, self._transformer, self._data.train
        if not (config.trains_part or config.train.changed_keys or data.weights is not None):
            return None
        from roll_sft.engine.recipes.recipe import prepared

        return prepared(self.chunks, source, config, layers=layers, data=data, is_new=is_new)

    def _mark_experts(self, source: ModelSource) -> "Experts | None":
        """The load of experts, where the model has some."""
        if source.shape.experts is None:
            return None
        from roll_sft.engine.moe.experts import Experts

        return Experts(self.chunks, source, self.config, recipe=self._recipe)

    def train_step(self, work: RankWork) -> StepMetrics | None:
        """One optimizer step; `work` is this rank's share of the global batch.

        On a GPU the update is queued when this returns, and runs while the next step is launched.
        """
        started = time.perf_counter()
        seed_step(self.config.seed, step=work.step)
        if self._recipe is not None:
            self._recipe.begin_step(work)
        batches = self._ahead.take(work.micro_batches)
        if work.next_micro_batches is not None:
            self._ahead.begin(work.next_micro_batches)
        data_wait_s = time.perf_counter() - started
        self.accumulate_gradients(batches)
        report = Readout(sums := self._report())
        grad_norm, is_updated = update(
            self.optimizer, learning_rate=work.learning_rate, loss=sums[0], limits=work.limits
        )
        if self._gathers_ahead:
            from roll_sft.engine.overlap import begin_gather

            begin_gather(self._wrapped)
        loss_sum, supervised, *told = report.read()
        experts = None if self._experts is None else self._experts.load()
        if not self._is_reporter:
            return None
        assert supervised == work.supervised_tokens, (
            f"step {work.step}: {supervised:.0f} tokens carried a label, the plan has"
            f" {work.supervised_tokens}"
        )
        peak_memory = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return StepMetrics(
            step=work.step,
            loss_sum=loss_sum,
            supervised_tokens=work.supervised_tokens,
            grad_norm=grad_norm,
            learning_rate=work.learning_rate,
            step_time_s=time.perf_counter() - started,
            data_wait_s=data_wait_s,
            peak_memory_gib=peak_memory / 2**30,
            is_skipped=not is_updated,
            told=tuple(told),
            experts=experts,
        )

    def evaluate(self, name: str, micro_batches: tuple[tuple[int, ...], ...]) -> EvalMetrics | None:
        """Loss of this rank's share of one chunk of validation set `name`; changes no state."""
        from roll_sft.engine.validation import Breakdown

        tokens, call_ids = self._data.validation[name], self._data.tool_call_ids
        batches = self.build(tokens, micro_batches)
        breakdown = Breakdown(batches, micro_batches, tokens, call_ids)
        self.forward(breakdown.batches)
        parts = breakdown.metrics(self.row_losses, self._layout, self._rank)
        loss_sum, supervised = self.reduce_losses()
        if not self._is_reporter:
            return None
        return replace(parts, loss_sum=loss_sum, supervised_tokens=supervised)

    def begin_save(self, folder: Path) -> None:
        """Write this rank's part into `folder`, which is not yet a checkpoint. Collective.

        With `checkpoint.async_save` this returns while a copy of the state is being written.
        A state that is not finite raises `DivergedError`, here or where the save ends.
        """
        self._gather_weights()
        state, step = self._state()
        writer = tensors.Writer(dist.get_rank(), dist.get_world_size(), step)

        def write(pieces: Sequence[tensors.Piece]) -> None:
            check_written(pieces)
            tensors.write(folder, pieces, objects=state.objects, writer=writer)

        pieces = [*state.written(), *(self._experts.kept() if self._experts else ())]
        if self._background is None:
            write(pieces)
        else:
            self._background.begin(pieces, write)

    def is_saved(self) -> bool:
        """Whether every save that began is on disk. Raises `CheckpointError`."""
        return self._background is None or self._background.is_done()

    def finish_save(self) -> None:
        """Wait until every save that began is on disk. Raises `CheckpointError`."""
        if self._background is not None:
            self._background.finish()

    def save(self, folder: Path) -> None:
        """`begin_save`, and wait for it."""
        self.begin_save(folder)
        self.finish_save()

    def _load(self, folder: Path) -> None:
        """Load weights, moments, masters and Adam's count from the checkpoint in `folder`.

        Collective. A checkpoint without optimizer state begins a fresh optimizer. Raises
        `CheckpointError`.
        """
        from roll_sft.checkpoint.index import read_index
        from roll_sft.checkpoint.manifest import read_manifest
        from roll_sft.engine.load_state import check_loaded, load_state

        index, step = read_index(folder), read_manifest(folder).state.optimizer_step
        make_optimizer_state(self.optimizer, step=step or 0)
        has_optimizer = step is not None
        load_state(index, self._rank_state(self.optimizer if has_optimizer else None))
        check_loaded(self.chunks, folder)
        if not has_optimizer:
            self.optimizer.reload_model_params()

    def _state(self) -> tuple[RankState, int | None]:
        """The state to save, and Adam's count if the optimizer is part of it."""
        if not self.config.checkpoint.save_optimizer:
            return self._rank_state(None), None
        step = optimizer_step(self.optimizer)
        if step == 0:  # there are no moments yet
            make_optimizer_state(self.optimizer, step=0)
        return self._rank_state(self.optimizer), step

    def _rank_state(self, optimizer: MegatronOptimizer | None) -> RankState:
        trained = None if self._recipe is None else self._recipe.places()
        return rank_state(self.chunks, optimizer, trained)

    def build(self, tokens: TokenSet, indices: Indices) -> list[MicroBatch]:
        """This rank's micro-batches of the samples `indices` of `tokens`, on the host."""
        batches = build_micro_batches(
            tokens,
            indices,
            layout=self._layout,
            rank=self._rank,
            vocab_size=self.shape.vocab_size,
        )
        if self._recipe is not None:
            batches = self._recipe.keyed(batches, indices, tokens)
        if self._experts is not None:
            batches = self._experts.marked(batches, indices, tokens, self._rank.context_rank)
        return [batch.pinned() for batch in batches] if self._device.type == "cuda" else batches

    def forward(self, batches: Sequence[MicroBatch]) -> None:
        """Forward alone over `batches`, for their losses; changes no state."""
        with self.inference():
            self._run_schedule(batches, forward_only=True)

    def accumulate_gradients(self, batches: Sequence[MicroBatch]) -> None:
        """Forward and backward over `batches`; leaves reduced, scaled gradients in `main_grad`."""
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self._experts is not None:
            self._experts.begin(batches, lambda: self._run_schedule(batches, forward_only=True))
        self._run_schedule(batches, forward_only=False)

    def reduce_losses(self) -> tuple[float, int]:
        """Loss sum and supervised tokens over the global batch, on the last pipeline stage."""
        loss_sum, supervised = self._report().tolist()
        return loss_sum, round(supervised)

    def gradient_norm(self) -> float:
        """Norm of the gradients of `accumulate_gradients`, before clipping; collective."""
        return gradient_norm(self.optimizer)

    def _gather_weights(self) -> None:
        """Have all weights on every data rank, and no exchange under way; collective."""
        if self._gathers_ahead:
            from roll_sft.engine.overlap import gather_weights

            gather_weights(self._wrapped)

    def _report(self) -> torch.Tensor:
        """`reduce_losses` as float64 [2] on the device, not waited for; see `Recipe.report`."""
        if not parallel_state.is_pipeline_last_stage():
            return torch.zeros(2, dtype=torch.float64, device=self._device)
        # By a fill: a tensor made of a Python number would be copied, and the copy waited for.
        count = torch.full((), self._num_supervised, dtype=torch.float64, device=self._device)
        total = torch.stack([rows.sum() for rows in self.row_losses]).double().sum()
        report = torch.stack([total, count])
        if self._recipe is not None:
            report = self._recipe.report(report)
        dist.all_reduce(
            report, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        return report

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """All weights on every data rank, and modules that evaluate, without gradients."""
        self._gather_weights()
        for chunk in self._wrapped:
            chunk.eval()
        with torch.no_grad():
            yield
        for chunk in self._wrapped:
            chunk.train()

    def _run_schedule(self, batches: Sequence[MicroBatch], *, forward_only: bool) -> None:
        # Of each micro-batch, on the last pipeline stage: float32 [R], as `supervised_rows` orders.
        self.row_losses: list[torch.Tensor] = []
        self._num_supervised = 0
        lengths = {batch.pack.tokens_T.shape[1] for batch in batches}
        # Read by the schedules at every call. Stages hold the same packs, so they agree.
        self._transformer.variable_seq_lengths = len(lengths) > 1
        get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=[iter(batches) for _ in self._wrapped],
            model=self._wrapped,
            num_microbatches=len(batches),
            # Of a whole pack; unused where packs differ in length and send their shapes ahead.
            seq_length=lengths.pop() * self._layout.context_size,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _forward_step(self, batches: Iterator[MicroBatch], model: Any) -> Any:
        batch = next(batches).to(self._device)
        self.on_micro_batch()
        if self._recipe is not None:
            self._recipe.begin_pack(batch)
        pack = batch.pack
        # On a CPU each call of torch passes through the mode of `cpu_backend`; no forward needs it.
        is_cpu = self._device.type == "cpu"
        with torch._C.DisableTorchFunction() if is_cpu else contextlib.nullcontext():
            losses = model(
                pack.tokens_T,
                pack.positions_T,
                None,
                packed_seq_params=describe_pack(
                    batch.segments,
                    pack.positions_T,
                    frequencies=self.frequencies,
                    token_keys=batch.token_keys,
                ),
                **loss_arguments(batch.rows),
                **({} if self._experts is None else self._experts.arguments(batch, model)),
            )

        def loss(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            # No collective here: data ranks may differ in their number of micro-batches.
            self.row_losses.append(rows.detach())
            self._num_supervised += pack.num_supervised
            count = torch.full((), pack.num_supervised, dtype=torch.int, device=rows.device)
            loss_sum = rows.sum()
            return loss_sum, count, loss_sum.detach()

        return losses, loss
