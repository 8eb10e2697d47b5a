"""Model code of the transmla format: latent attention inside a source family's own transformers classes.

- ``configuration_transmla``, ``modeling_transmla``: shipped inside every export of the transmla format. They import
  only torch, transformers and each other, so that an export loads where transmla is not installed.
- ``transformers_api``: not shipped. It registers the format with the Auto classes and names what transformers renamed
  between versions.
"""
