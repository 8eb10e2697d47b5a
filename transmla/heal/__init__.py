"""Healing: a short distillation that recovers quality lost to the conversion.

The student (an export) learns the teacher's next-token distributions (Hinton et al. 2015, arXiv 1503.02531).

- ``run.py``: ``heal``, one run from start to finish.
- ``settings.py``: the options of a run. ``choose.py``: the healing that ends a conversion, by device and memory.
- ``checks.py``: input checks that run before anything is written. ``memory.py``: the memory of a run, and its refusal.
- ``batches.py``: training and held-out texts; each batch depends only on the step number.
- ``natural_coordinates.py``: the coordinates that healing trains in.
- ``balance.py``: rescales the factors of each product to equal size.
- ``attention.py``: attention over whole sequences, without waiting for the GPU.
- ``losses.py``: the distillation loss, computed in chunks.
- ``passes.py``: the forward and backward passes of a step.
- ``learning_rate.py``: the peak learning rate and its schedule.
- ``optimiser.py``: trainable parameters, and AdamW in units of each tensor's size.
- ``loop.py``: training steps, held-out evaluations, saves and rollbacks.
- ``resume.py``: the state of a run on disk.
- ``distributed.py``: differences between one process, DDP, FSDP2 and DeepSpeed.
- ``write_export.py``: writes and verifies the healed export.
- ``__main__.py``: ``python -m transmla.heal``, an alias of ``transmla heal``.
"""
