"""Studies: what is searched for and trained, and the work that a record lacks."""
