"""`Engine`: one rank's `train_step`, `evaluate` and `save`; the only caller of mcore's schedules.

Assumes it runs inside `parallel.process_groups`. All ranks make the same calls in the same order;
each gets the micro-batches of its data rank. Promises: the loss and the gradient are those of the
global batch, whatever the layout; a call returns metrics on the reporting rank and None elsewhere;
within a step nothing of ours waits for the device, and its end is the only wait.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from roll_sft.base.metrics import EvalMetrics, StepMetrics
from roll_sft.checkpoint import tensors
from roll_sft.checkpoint.background import Saver
from roll_sft.checkpoint.manifest import read_manifest
from roll_sft.checkpoint.torch_dist import read_index
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.data.steps.batch import PackedBatch, build_batch, common_tokens
from roll_sft.data.steps.plan import RankWork
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.engine import build, compiling, finite, state
from roll_sft.engine.attention import describe_pack, segments_of
from roll_sft.engine.attention_kernels import Heads, choose_kernel
from roll_sft.engine.loss import SupervisedRows, loss_arguments, supervised_rows
from roll_sft.engine.microbatch import BuildAhead, Indices, MicroBatch
from roll_sft.engine.peak_memory import PeakMemory
from roll_sft.engine.process_groups import seed_step
from roll_sft.engine.weight_gradients import accumulate_in_products
from roll_sft.job.inputs import ModelSource, TokenData


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
        """Begin with the weights of `source`, or where `checkpoint` stands; collective."""
        self._config = config
        self._layout = layout_of(config.parallel)
        self._shape = source.shape
        self._data = data
        self._device = torch.device(torch.cuda.current_device())
        torch.use_deterministic_algorithms(config.deterministic)
        self._transformer = build.transformer_config(source.shape, self._layout, config=config)
        compiling.turn_on(
            self._transformer, on=compiling.choose(config.model.compile, device=self._device)
        )
        accumulate_in_products(self._transformer, device=self._device)
        kernel = choose_kernel(
            config.model.attention_backend,
            device=self._device,
            dtype=build.DTYPES[config.model.dtype],
            heads=Heads(
                source.shape.num_attention_heads // self._layout.tensor_size,
                max(1, source.shape.num_key_value_heads // self._layout.tensor_size),
                source.shape.head_dim,
            ),
        )
        self.chunks = build.build_model(source.shape, self._transformer, kernel=kernel)
        if checkpoint is None:
            build.load_weights(self.chunks, source.family, source.shape, source=source.tensors)
            finite.check_given(self.chunks, source.family, source.shape, source=source.tensors)
        else:
            build.clear_weights(self.chunks)
        self._wrapped = build.wrap_model(
            self.chunks,
            self._transformer,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        )
        self.optimizer = build.build_optimizer(config, self._wrapped)
        self._is_reporter = dist.get_rank() == self._layout.reporting_rank
        self._saver = Saver()
        self._peak_memory = PeakMemory(self._device)
        self._ahead = BuildAhead(lambda indices: self.build(self._data.train, indices))
        if checkpoint is not None:
            self._load(checkpoint)

    def train_step(self, work: RankWork) -> StepMetrics | None:
        """One optimizer step over the global batch that `work` is this rank's share of.

        On a GPU the update itself is queued when this returns, and runs while the next is launched.
        """
        started = time.perf_counter()
        seed_step(self._config.seed, step=work.step)
        batches = self._ahead.take(work.micro_batches)
        if work.next_micro_batches is not None:
            self._ahead.begin(work.next_micro_batches)
        data_wait_s = time.perf_counter() - started
        self.accumulate_gradients(batches)
        report = Readout(self._report())
        build.set_learning_rate(self.optimizer, work.learning_rate)
        _updated, grad_norm, _zeros = self.optimizer.step()
        loss_sum, supervised = report.read()
        if not self._is_reporter:
            return None
        assert supervised == work.supervised_tokens, (
            f"step {work.step}: {supervised:.0f} tokens carried a label, the plan has"
            f" {work.supervised_tokens}"
        )
        return StepMetrics(
            step=work.step,
            loss_sum=loss_sum,
            supervised_tokens=work.supervised_tokens,
            grad_norm=float(grad_norm),
            learning_rate=work.learning_rate,
            step_time_s=time.perf_counter() - started,
            data_wait_s=data_wait_s,
            peak_memory_gib=self._peak_memory.take_gib(),
        )

    def evaluate(self, name: str, micro_batches: tuple[tuple[int, ...], ...]) -> EvalMetrics | None:
        """Loss of this rank's share of one chunk of validation set `name`; changes no state."""
        self.forward(self.build(self._data.validation[name], micro_batches))
        loss_sum, supervised = self.reduce_losses()
        return EvalMetrics(loss_sum, supervised) if self._is_reporter else None

    def begin_save(self, folder: Path) -> None:
        """Write this rank's part into `folder`, which is not yet a checkpoint. Not collective.

        With `async_save` it is being written when this returns; it holds the state as it is now.
        What is not finite is not written: `DivergedError`, from here or where the save ends.
        """
        state, step = self._state()
        writer = tensors.Writer(dist.get_rank(), dist.get_world_size(), step)

        def write(pieces: Sequence[tensors.Piece]) -> None:
            finite.check_state(pieces)
            tensors.write(folder, pieces, objects=state.objects, writer=writer)

        if self._config.checkpoint.async_save:
            self._saver.begin(state.written(), write)
        else:
            write(state.written())

    def is_saved(self) -> bool:
        """Whether all that `begin_save` began is on disk. Raises `CheckpointError`."""
        return self._saver.is_done()

    def finish_save(self) -> None:
        """Wait until all that `begin_save` began is on disk. Raises `CheckpointError`."""
        self._saver.finish()

    def save(self, folder: Path) -> None:
        """`begin_save`, and wait for it."""
        self.begin_save(folder)
        self.finish_save()

    def _load(self, folder: Path) -> None:
        """Take weights, moments, masters and Adam's count from the checkpoint in `folder`.

        Collective. Where the checkpoint has no optimizer, a fresh one begins. Raises
        `CheckpointError`.
        """
        index, step = read_index(folder), read_manifest(folder).state.optimizer_step
        state.make_optimizer_state(self.optimizer, step=step or 0)
        optimizer = None if step is None else self.optimizer
        state.load(index, state.rank_state(self.chunks, optimizer))
        finite.check_loaded(self.chunks, folder)
        if optimizer is None:
            self.optimizer.reload_model_params()

    def _state(self) -> tuple[state.RankState, int | None]:
        """What there is to save, and Adam's count if the optimizer is part of it."""
        if not self._config.checkpoint.save_optimizer:
            return state.rank_state(self.chunks, None), None
        step = state.optimizer_step(self.optimizer)
        if step == 0:  # there are no moments yet
            state.make_optimizer_state(self.optimizer, step=0)
        return state.rank_state(self.chunks, self.optimizer), step

    def build(self, tokens: TokenSet, indices: Indices) -> list[MicroBatch]:
        """This context rank's slices of the micro-batches `indices` of `tokens`, on the host."""
        layout, rank = self._layout, parallel_state.get_context_parallel_rank()
        batches = []
        samples = [[tokens.sample(index) for index in ids] for ids in indices]
        num_tokens = common_tokens(samples, layout=layout)
        for members in samples:
            pack = build_batch(members, layout=layout, context_rank=rank, num_tokens=num_tokens)
            segments = segments_of(
                pack.cu_seqlens, context_size=layout.context_size, context_rank=rank
            )
            batch = MicroBatch(pack, segments, self._supervised_rows(pack))
            batches.append(batch.pinned() if self._device.type == "cuda" else batch)
        return batches

    def forward(self, batches: Sequence[MicroBatch]) -> None:
        """Forward alone over `batches`, for their losses; changes no state."""
        self._set_training(training=False)
        with torch.no_grad():
            self._run_schedule(batches, forward_only=True)
        self._set_training(training=True)

    def accumulate_gradients(self, batches: Sequence[MicroBatch]) -> None:
        """Forward and backward over `batches`; leaves reduced, scaled gradients in `main_grad`."""
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run_schedule(batches, forward_only=False)

    def reduce_losses(self) -> tuple[float, int]:
        """Loss sum and supervised tokens over the global batch, on the last pipeline stage."""
        loss_sum, supervised = self._report().tolist()
        return loss_sum, round(supervised)

    def gradient_norm(self) -> float:
        """Norm over all parameters once of what `accumulate_gradients` left, before clipping."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def _report(self) -> torch.Tensor:
        """`reduce_losses` as float64 [2] on the device, without waiting for it."""
        if not parallel_state.is_pipeline_last_stage():
            return torch.zeros(2, dtype=torch.float64, device=self._device)
        # By a fill: a tensor made of a Python number would be copied, and the copy waited for.
        count = torch.full((), self._num_supervised, dtype=torch.float64, device=self._device)
        total = torch.stack([rows.sum() for rows in self.row_losses]).double().sum()
        report = torch.stack([total, count])
        dist.all_reduce(
            report, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        return report

    def _supervised_rows(self, batch: PackedBatch) -> SupervisedRows:
        """What the head of this rank takes of `batch`, on the host."""
        shards = self._layout.tensor_size if self._layout.sequence_parallel else 1
        return supervised_rows(
            batch.rows,
            batch.row_labels,
            num_tokens=batch.tokens_T.shape[1],
            vocab_size=self._shape.vocab_size,
            sequence_shards=shards,
            shard_rank=parallel_state.get_tensor_model_parallel_rank() if shards > 1 else 0,
        )

    def _set_training(self, *, training: bool) -> None:
        for chunk in self._wrapped:
            chunk.train(training)

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
        pack = batch.pack
        losses = model(
            pack.tokens_T,
            pack.positions_T,
            None,
            packed_seq_params=describe_pack(
                batch.segments, pack.positions_T, max_seqlen=pack.max_seqlen
            ),
            **loss_arguments(batch.rows),
        )

        def loss(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            # No collective here: data ranks may differ in their number of micro-batches.
            self.row_losses.append(rows.detach())
            self._num_supervised += pack.num_supervised
            count = torch.full((), pack.num_supervised, dtype=torch.int, device=rows.device)
            loss_sum = rows.sum()
            return loss_sum, count, loss_sum.detach()

        return losses, loss
