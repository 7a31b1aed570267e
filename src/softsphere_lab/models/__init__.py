"""Networks and output layers."""
