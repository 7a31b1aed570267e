"""The paper's experiments, run again, and the questions that it leaves open."""
