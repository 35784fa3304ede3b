"""From raw text to batches: sources -> tokenizer -> shards -> loader. Knows no model."""
