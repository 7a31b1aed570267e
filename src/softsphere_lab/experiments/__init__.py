"""The experiments: the claim of each, what is run for it, and what its record shows."""
