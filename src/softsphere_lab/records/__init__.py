"""Run folders and checkpoints; each of their files is whole or absent."""
