"""Read what a conversion starts from: a source checkpoint and its calibration text.

- ``locate``: resolve a source's name to a local path, through an installed package or the Hub's cache.
- ``gguf``: unpack a GGUF file into the cache, once. ``gguf_header``: its fields and the places of its tensors.
  ``gguf_weights``: its tensors, dequantised one at a time. ``gguf_copies``: the copies in the cache.
- ``checkpoint``: read tensors one by one from safetensors, pickle or GGUF files.
- ``packed_weights``: FP8 and compressed-tensors, dequantised one tensor at a time.
- ``load``: load whole models and tokenizers through transformers.
- ``describe``: derive an ``AttentionSpec`` from a Hugging Face config.
- ``layer_rules``: what a family's own code does to the attention scores of each layer.
- ``card``: licence, languages and base of the source, from its model card.
- ``check_tensors``: check that a checkpoint's tensors agree with its config.
- ``open_source``: run all of the above, and return a checked ``Source``.
- ``decoder_layer``: build and run one of a family's decoder layers, with any attention inside it.
- ``attention_view``: express an attention as linear maps of its features.
- ``output_head``: compare hidden states by the next tokens that they predict.
- ``text``: read one text as tokens. ``texts/``: the named texts, and readers of files and Hub datasets.
- ``mixture``: several texts in given shares; the default mixture ``auto``.
- ``openings``: what samples of the model begin with. ``self_text``: sample. ``samples``: the cache of samples.
- ``device``: choose the device of a run. ``memory``: free memory of the computer and of a GPU.
"""
