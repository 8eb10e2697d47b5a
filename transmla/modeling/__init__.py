"""What runs inside a transformers model: MLA attention over its latent cache. Imports torch and transformers only."""
