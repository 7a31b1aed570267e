"""Engines compute (s, q, c) and pull their partials back; they never name a loss."""
