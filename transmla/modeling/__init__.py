"""Model code of the transmla format: latent attention inside a source family's own transformers classes.

- ``configuration_transmla``, ``modeling_transmla``: shipped inside every export of the transmla format. They import
  only torch, transformers and each other, so that an export loads where transmla is not installed.
- ``registration``: not shipped. It registers the format with transformers' Auto classes.
- ``transformers_api``: not shipped. It names what transformers renamed between versions.
- ``sdpa``: not shipped. It chooses among PyTorch's kernels for attention.
"""
