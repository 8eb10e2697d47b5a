"""Model families: one file per family of source models.

To add a family, add a file that defines ``FAMILY``, an instance of ``families.base.Family``. Its ``name`` is the
``model_type`` in the Hugging Face config. ``registry.scan`` imports every file of this folder, so no list needs an
entry, and the tests convert the new family's tiny model. Then run ``python scripts/generate_docs.py`` to update the
table in ``docs/families.md``.

A family file states the features that DeepSeek-V3's format cannot store and a tiny config for the tests. If the family
differs from Llama, the file also states the tensor names, the order of rotary channels (``interleaved``) and the module
after the attention (``after_attention``). All other properties are read from transformers' model class. A family file
may not import torch or transformers.
"""
