"""Experiments: data, models, training, records, statistics, figures and the command line."""
