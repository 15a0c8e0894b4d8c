"""The one room that calls a model: from a collated batch to per-token tables."""
