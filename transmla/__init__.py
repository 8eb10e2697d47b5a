"""Convert pretrained Hugging Face models from MHA/GQA to Multi-head Latent Attention (MLA).

Singular folders are stages, in the order in which a model passes through them. Plural folders are shelves: each file on
them is one plug-in that is found by its presence.

    recipe.py     all settings of a conversion, typed; the command line makes its flags from them
                  recipe_values.py reads those of them that are a word or a number
    artifacts.py  the frozen values that the stages hand to each other: spec, plan, weights, statistics, factors
    source/       read a checkpoint: find it, check it, describe its attention; mix and sample text
                  source/texts/ is a SHELF of named texts
    guard/        check a model's files before a library reads them: links, pointers, indices, counts, pickles
    families/     SHELF: one file a model family (what a Qwen3 needs)
    plan/         decide before a weight is read: format, widths, rotary slots, fit, cost
    core/         the mathematics, one layer at a time; core/methods/ is a SHELF of conversion methods
    convert/      the conversion: prepare, then layer by layer observe, factorise, fit, write
    formats/      SHELF: how an export is stored (native DeepSeek-V3, or the source's classes with MLA inside)
    signature/    what an export computes and contains, and whether it still does
    export/       write a folder that is whole or absent: shards, manifest, tokenizer, card; push it
    modeling/     the code that travels inside exports
    runtime/      transmla.load: the latent cache, attention over it, shared prefixes
    kernels/      SHELF: decode kernels
    heal/         distillation from the source: settings, learning rates, losses, loop
    serve/        use an export: chat, servers (transformers, vLLM, SGLang), GGUF files for llama.cpp
    evaluate/     perplexity and KL, tasks, retrieval, verification, speed
    workflow.py   one run from a source to a healed export
    cli/          the command line
    autoload.py   registers the transmla format as soon as transformers is imported
    ranks.py      the processes of one launch: split work over them, and add up their results
    token_split.py  sequences split by tokens over processes, and by heads in the attention
    cuda_graphs.py  replay a step of a fit or a healing from a CUDA graph
    shares.py     NAME:WEIGHT entries of a mixture of texts
    files.py      write files that are whole or absent
    errors.py     the one error a user reads: what is wrong, the limit, the remedy
    boundary.py   the one place where errors of the system and of libraries become that error
    registry.py   finds the plug-ins on a shelf
    reporter.py   how long work reports its progress

Later stages import earlier ones, never the reverse.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transmla.modeling.registration import register
    from transmla.runtime.load import accelerate, load
    from transmla.runtime.shared_prefix import shared_prefix

__all__ = ["accelerate", "load", "register", "shared_prefix"]
_PUBLIC = {
    "accelerate": "transmla.runtime.load",
    "load": "transmla.runtime.load",
    "register": "transmla.modeling.registration",
    "shared_prefix": "transmla.runtime.shared_prefix",
}
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used, because transformers takes seconds to import."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'transmla' has no attribute '{name}'")


def __dir__() -> list[str]:
    """Return the module's names, with the public functions that are not imported yet."""
    return sorted({*globals(), *_PUBLIC})
