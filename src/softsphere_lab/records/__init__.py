"""Run folders and checkpoints, each file whole or not there."""
