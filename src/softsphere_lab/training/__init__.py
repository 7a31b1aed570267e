"""Training runs, which can be stopped after any step and resumed."""
