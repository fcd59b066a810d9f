"""Parts of models that are no plain decoder, on one rank."""
