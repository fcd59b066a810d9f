"""How many rows the head takes at a time; apart from it, because plans need it without Megatron."""

# Chunks are this small only where logits are large: below, one chunk is quicker.
SMALL_LOGITS_BYTES = 16 << 20
CHUNKS, MIN_ROWS, MAX_ROWS = 8, 128, 512
# On a GPU each chunk reads and writes the whole fp32 gradient of the weight, so that few large
# chunks are quicker; the logits of one, in half precision, and their gradient take this much each.
GPU_LOGITS_BYTES = 640 << 20


def chunk_rows(rows: int, width: int, *, on_gpu: bool) -> int:
    """Rows of a chunk, for logits [rows, width]."""
    if on_gpu:
        most = max(GPU_LOGITS_BYTES // (2 * width), MIN_ROWS)
        num_chunks = max(1, -(-rows // most))
        return max(1, -(-rows // num_chunks))
    if rows * width * 4 <= SMALL_LOGITS_BYTES:
        return max(rows, 1)
    return min(max(rows // CHUNKS, MIN_ROWS), MAX_ROWS)
