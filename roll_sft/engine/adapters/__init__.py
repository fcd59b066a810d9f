"""LoRA and QLoRA on one rank."""
