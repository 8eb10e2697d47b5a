"""Conversion methods: one file per way to factor an attention layer.

To add a method, add a file that defines ``METHOD``, an instance of ``core.methods.base.Method``. ``registry.scan``
imports every file of this folder, so no list needs an entry. ``--method`` then accepts the ``name``, and ``tests/core``
includes the new method.

``factorize(weights, stats, plan)`` must be a pure function: it works in float64 and does not change its arguments. If
the plan removes nothing, the result must equal the source's attention. ``calibrated`` is the default; the other methods
are published methods, for comparison.
"""
