"""Read what a conversion starts from: a source checkpoint and its calibration text.

- ``locate``: resolve a source's name to a local path, through an installed package or the Hub's cache.
- ``checkpoint``: read tensors one by one from safetensors, pickle or GGUF files.
- ``load``: load whole models and tokenizers through transformers.
- ``describe``: derive an ``AttentionSpec`` from a Hugging Face config.
- ``check_tensors``: check that a checkpoint's tensors agree with its config.
- ``open_source``: run all of the above, and return a checked ``Source``.
- ``decoder_layer``: build and run one of a family's decoder layers, with any attention inside it.
- ``attention_view``: express an attention as linear maps of its features.
- ``text``: read calibration and evaluation text as tokens.
- ``self_text``: sample calibration text from the source model.
- ``device``: choose the device of a run.
"""
