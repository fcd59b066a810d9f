"""How many rows the head takes at a time; apart from it, because plans need it without Megatron."""

# Chunks are this small only where logits are large: below, one chunk is quicker.
SMALL_LOGITS_BYTES = 16 << 20
CHUNKS, MIN_ROWS, MAX_ROWS = 8, 128, 512


def chunk_rows(rows: int, width: int) -> int:
    """Rows of a chunk, for logits fp32 [rows, width]."""
    if rows * width * 4 <= SMALL_LOGITS_BYTES:
        return max(rows, 1)
    return min(max(rows // CHUNKS, MIN_ROWS), MAX_ROWS)
