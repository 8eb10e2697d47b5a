"""Sign an export, and compare it with its signature: what it computes and contains, not which bytes it has.

- ``probe``: seeded inputs, and projections of outputs onto seeded directions.
- ``layers``: run a model one decoder layer at a time, and project what it computes.
- ``tokenizer``: describe what a tokenizer does.
- ``sign``: make the signature of an export.
- ``compare``: compare an export with its signature.

The manifest holds the signature (``export/signature.py``).
"""
