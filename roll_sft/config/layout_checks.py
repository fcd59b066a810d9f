"""Checks of parallel degrees and of the attention backend, once device and dtype are decided."""

from collections.abc import Iterator

from roll_sft.config.schema import ParallelConfig, RunConfig


def layout_problems(parallel: ParallelConfig) -> Iterator[str]:
    """One line for each problem of the degrees of `parallel`, whatever the model."""
    degrees = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "cp": parallel.context_parallel_size,
    }
    if min(degrees.values()) < 1 or parallel.num_workers < 1:
        return  # reported as lower bounds
    product = degrees["tp"] * degrees["pp"] * degrees["cp"]
    if parallel.num_workers % product:
        yield (
            f"parallel: tensor_model_parallel_size {degrees['tp']} x pipeline_model_parallel_size"
            f" {degrees['pp']} x context_parallel_size {degrees['cp']} = {product} does not divide"
            f" num_workers {parallel.num_workers}; choose degrees whose product divides"
            f" {parallel.num_workers}, or set parallel.num_workers to a multiple of {product}"
        )
    if parallel.sequence_parallel and degrees["tp"] == 1:
        yield (
            "parallel.sequence_parallel: true needs tensor_model_parallel_size above 1, which is 1;"
            " raise it or set sequence_parallel=false"
        )
    for key in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if parallel.overlap_param_gather and getattr(parallel, key) is False:
            yield f"parallel.overlap_param_gather: true needs {key}=true; set it, or leave both out"
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is not None and virtual > 1 and degrees["pp"] == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size: {virtual} interleaves the stages of a"
            " pipeline, and pipeline_model_parallel_size is 1; raise it or set the virtual one null"
        )


def backend_problems(config: RunConfig) -> Iterator[str]:
    """Why `model.attention_backend` cannot run; a device or dtype of `auto` is not judged."""
    backend = config.model.attention_backend
    if backend in ("auto", "sdpa"):
        return
    for key, value, wanted in (
        ("model.dtype", config.model.dtype, "bf16"),
        ("parallel.device", config.parallel.device, "cuda"),
    ):
        if value in ("fp32", "cpu"):
            yield (
                f"model.attention_backend: {backend!r} does not run with {key}={value}; choose"
                f" {key}={wanted}, or sdpa"
            )
