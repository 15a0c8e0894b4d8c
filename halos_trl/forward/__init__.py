"""Forward passes: from a collated batch to per-token tables. Only this package calls models in training."""
