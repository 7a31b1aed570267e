"""Losses compared on images, by the papers and by users."""
