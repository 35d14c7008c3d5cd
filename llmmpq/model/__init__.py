"""Read a Hugging Face model block by block: checkpoint files, skeleton, streaming, token batches."""
