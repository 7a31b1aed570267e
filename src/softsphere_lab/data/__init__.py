"""Data sets of images and of text."""
