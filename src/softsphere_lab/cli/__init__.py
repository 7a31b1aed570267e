"""The commands of `softsphere`."""
