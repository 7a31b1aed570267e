"""Experiments of the papers and of this library, each as a plan, a record and its report."""
