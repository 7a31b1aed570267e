"""Bridges to other frameworks.

`softsphere.integrations.transformers` gives a language model of Hugging Face an output layer of
softsphere, and `softsphere.integrations.skorch` makes classifiers of scikit-learn. Nothing imports
them unasked.
"""
