"""Statistics, tables and pictures of records."""
