"""Training runs that can be left after any step and resumed."""
