"""Output layers compared on text."""
