"""Healing: a short distillation that wins back what compression lost.

The student learns the teacher's distributions over next tokens (Hinton et al., arXiv 1503.02531). It is trained in
natural coordinates (``natural.py``), with rates in units of each tensor's size (``optimiser.py``), on batches that
are a function of their step (``text.py``), and becomes the same kind of export again (``finish.py``).
"""
