"""Use an export: chat in a terminal, serve it in other runtimes, and write it for them.

- ``chat``: a conversation in a terminal.
- ``request``: checks of what is asked for, before torch is imported.
- ``launch``: choose and start an installed server.
- ``transformers_server``: start transformers' server.
- ``gguf_file``: write a GGUF file for llama.cpp, with ``gguf_fields``, ``gguf_tensors``, ``gguf_scale``,
  ``gguf_quantise`` and ``gguf_tokenizer``; ``gguf_check`` runs it through ``llama_cpp_run``.
- ``widen``: pad tensors with zeros to the widths of a runtime's kernels.
- ``modules``: the rotary embedding, and a separate map for each head.
- ``family_config``: the config with which vLLM and SGLang serve an export.
- ``vllm_plugin``: registration in vLLM (entry point ``vllm.general_plugins``), and the config that vLLM reads.
- ``vllm_model``: vLLM's own model classes with latent attention inside.
- ``vllm_worker``: vLLM's worker, which compares the loaded model with the export's signature before it serves.
- ``sglang_plugin``: hooks in SGLang (entry point ``sglang.srt.plugins``), and the config that SGLang reads.
- ``sglang_model``: SGLang's own model classes with latent attention inside.
- ``sglang_check``: the comparison of the loaded model with the export's signature, in SGLang's scheduler.
- ``self_check``: the comparison.

``formats.serve_limits`` says what the plugins serve. Only ``vllm_model`` and ``vllm_worker`` import vLLM, and only vLLM
imports these two; likewise ``sglang_model`` and ``sglang_check`` for SGLang.
"""
