"""The `softsphere` command."""
