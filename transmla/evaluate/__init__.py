"""Evaluation: the quality, consistency and decoding speed of an export.

- ``perplexity_and_kl.py``: perplexity of a model on a text, and its KL divergence from a baseline.
- ``bench.py``: decoding speed over a grid of batch sizes and context lengths.
- ``compare.py``: both measurements for models given by name, with a baseline.
- ``verify.py``: the checks of ``transmla verify``.
- ``figures.py``: PNG figures of decoding speeds and healing curves.
"""
