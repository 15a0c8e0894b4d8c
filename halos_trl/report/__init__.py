"""A page about runs: what they were given, what happened, what stands out."""
