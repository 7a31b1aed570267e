"""The time of a training step, measured in a process of its own."""
