"""Examples: columns to texts, splits that share none, prompts, answers as spans, and batches."""
