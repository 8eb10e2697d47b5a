"""Convert pretrained Hugging Face models from MHA/GQA to Multi-head Latent Attention (MLA)."""

__version__ = "0.1.0"
