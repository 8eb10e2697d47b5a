"""Export formats: how a converted model is stored, one file a format.

base              ``Format``, the contract of every format, and the look-up by name
native            the native format: a dense DeepSeek-V3 without custom code
native_layout     names and layout of the native format's attention tensors
native_rotary     the rotary table that runtimes compute from a DeepSeek-V3 config
native_natural    the latent scale of native exports, removed for healing and restored for saving
transmla          the transmla format: the source family's classes with latent attention inside
runtimes          which runtimes read an export, and with which kernels
serve_limits      which exports of the transmla format the plugins for vLLM and SGLang (``serve/``) serve
llama_cpp_limits  which native exports llama.cpp computes
model_checks      checks of a loaded export, shared by the formats

To add a format, put one file into this folder that subclasses ``Format`` and assigns an instance to ``FORMAT``. The
registry then lists the format in ``--format``; ``plan``, ``convert``, ``verify`` and ``heal`` need no other change.
"""
