"""Output layers compared on items that users like."""
