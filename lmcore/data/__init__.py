"""Text to batches: documents, tokenizer, token store, order, blocks, batches."""
