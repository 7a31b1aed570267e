"""One training by several engines, and the seconds of a training step."""
