"""Fast decoding for loaded MLA models: ``transmla.load`` and the latent cache.

- ``load``: ``load`` and ``accelerate``, which give a model's MLA layers a decode backend from ``transmla.kernels``.
- ``latent_attention``: the attention function that these layers call.
- ``latent_cache``: a cache layer that grows without copying.
- ``packed_rows``: the layout of cached rows whose latents are float8.
- ``shared_prefix``, ``prefix_cache``: one prompt, cached once for many continuations.
"""
