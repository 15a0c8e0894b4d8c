"""Rows in, batches out: checks of raw rows and the KL partners of an optimizer step."""
