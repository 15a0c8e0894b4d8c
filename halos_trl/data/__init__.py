"""From rows to batches: checks of raw rows, tokenization, groups and KL partners."""
