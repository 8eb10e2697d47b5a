"""Evaluation: the quality, consistency and decoding speed of an export.

- ``perplexity_and_kl.py``: perplexity of a model on a text, and its KL divergence from a baseline.
- ``windows.py``: the windows over a text, with or without BOS, and the predictions that count.
- ``scores.py``: sums by window and position, standard errors, and the mean over texts.
- ``texts.py``: check, read and cut the texts of an evaluation.
- ``bench.py``: decoding speed over a grid of batch sizes and context lengths.
- ``compare.py``: both measurements for models given by name, with a baseline.
- ``tasks.py``: scores on tasks of lm-evaluation-harness, beside a baseline's. ``harness.py`` talks to the harness.
- ``retrieval.py``: how often a model finds a pass key in a long text. ``retrieval_prompts.py`` writes the prompts.
- ``settings.py``: the flags of tasks and retrieval. ``open_model.py``: opens a model for them.
- ``score_table.py``: their tables.
- ``verify.py``: the checks of ``transmla verify``. ``verify_source.py``: those with ``--source``.
- ``adopt.py``: completes an export that other software has saved again. ``record.py``: records that checks passed.
- ``figures.py``: PNG figures of decoding speeds and healing curves.
"""
