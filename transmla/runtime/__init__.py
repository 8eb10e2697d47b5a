"""Fast decoding for loaded MLA models: ``transmla.load`` and the latent cache.

- ``load``: ``load`` and ``accelerate``, which give a model's MLA layers a decode backend from ``transmla.kernels``.
- ``class_swap``: modules that become instances of subclasses, also on several devices.
- ``latent_attention``: the attention function that these layers call.
- ``absorbed``: attention to latents, and when it gives the same result as expanded keys and values.
- ``forms``: whether absorbed or expanded attention costs less.
- ``expansion``: keys and values of all heads from latents.
- ``family_attention``: attention to expanded keys and values, as the family computes it.
- ``head_widths``: one width for queries, keys and values.
- ``underflow``: refusal of float16 for latents that it cannot represent.
- ``latent_cache``: a cache layer that grows without copying.
- ``packed_rows``, ``packed_static``: the layout of cached rows whose latents are float8, and static caches of them.
- ``graphed_model``: model classes whose decode steps come from CUDA graphs.
- ``decode_graphs``: which steps are captured, and when they are captured anew.
- ``next_step``: what is checked before a step that follows a replayed one.
- ``known_masks``: attention masks that need not be read from the GPU.
- ``decode_request``: a step as the arguments of a model describe it.
- ``graphable``: which models can be captured, and whether a model has changed.
- ``fused_norms``: norms in one kernel each.
- ``shared_frequencies``: rotary angles that captured steps compute once.
- ``static_steps``: steps over static caches.
- ``graph_recorder``: capture and replay.
- ``step_cache``: cache and inputs of a step on fixed memory.
- ``context_parallel``, ``split_cache``: several processes that share each cache, token by token.
- ``shared_prefix``, ``prefix_cache``: one prompt, cached once for many continuations.
"""
