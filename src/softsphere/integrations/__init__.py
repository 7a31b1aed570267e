"""Bridges to other frameworks.

`softsphere.integrations.transformers` gives a language model of Hugging Face an output layer of
softsphere. Nothing imports it unasked, and it imports its framework when it is used.
"""
