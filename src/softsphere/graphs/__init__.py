"""Graphs of what a function does, which are recorded once and run many times."""
