"""Every experiment: a claim, what is run for it, and what its record shows."""
