"""Load MLA models so that plain ``generate()`` decodes over their latent cache."""

from __future__ import annotations

import logging
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from transmla.boundary import boundary
from transmla.errors import TransmlaError
from transmla.guard.config import check_config
from transmla.guard.folder import check_folder
from transmla.guard.named import existing_path, refuse_unfinished
from transmla.kernels import Backend, DecodeShape, choose_backend
from transmla.kernels.custom_op import compilable
from transmla.ranks import Ranks
from transmla.registry import lookup

_log = logging.getLogger(__name__)

# The only value of ``cache_dtype`` besides None.
FLOAT8 = "float8_e4m3fn"


def load(
    path: str | Path,
    *,
    backend: str = "auto",
    cache_dtype: str | None = None,
    cuda_graphs: bool = True,
    context_parallel: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Load a causal language model with MLA for fast decoding.

    Args:
        path: an export, a checkpoint folder or a Hub id. Any MLA model that transformers runs is accepted.
        backend: the decode kernels: ``auto``, ``torch``, ``triton``, ``hopper``, ``flashmla`` or ``flashinfer``. If
            they cannot serve the model, the log warns with the reason, and the next ones that can are taken.
        cache_dtype: ``float8_e4m3fn`` to cache latents as float8 with one scale per token; None for the model's dtype.
        cuda_graphs: whether decode steps on a GPU are replayed from CUDA graphs. A step that cannot be captured runs
            eagerly, with the same result.
        context_parallel: whether the R processes that torchrun started share each cache (decode context parallelism):
            every process caches every R-th token. All processes must then make the same calls, and get the same
            results. Each loads the model onto the GPU of its own number. One process caches all tokens. None: if
            ``tp_plan`` is given, by which transformers divides the weights, and leaves the attention whole.
        kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map``, …). With an
            ``attn_implementation``, the model computes as transformers does, until ``set_attn_implementation`` sets
            ``latent_attention``.

    Returns:
        A transformers model in evaluation mode; with ``output_loading_info``, a pair of it and that information.

    Raises:
        TransmlaError: if ``path`` is no path and no Hub id, if it is the folder of an unfinished conversion, if
            transformers cannot load the model, or for any reason listed in ``accelerate``.
    """
    from transformers import AutoModelForCausalLM

    from transmla.modeling.registration import register

    register()
    # With ``tp_size``, other groups of processes may read other texts.
    divided = kwargs.get("tp_plan") is not None and kwargs.get("tp_size") is None
    implied = context_parallel is None and divided
    shares = bool(context_parallel) or implied
    if shares:
        from transmla.runtime.context_parallel import divides_heads, placed

        kwargs = placed(kwargs)
    folder = existing_path(
        str(path), "model", "the folder of an export, a checkpoint folder, or a Hub id such as org/name"
    )
    if folder is not None:
        refuse_unfinished(folder)
        path = str(folder)
    # Without these, transformers would ask whether to run the checkpoint's code, and would open pickled weights.
    kwargs = {"trust_remote_code": False, "use_safetensors": True} | kwargs
    what, remedy = f"transformers cannot load '{path}'", "give the folder of an export or the Hub id of an MLA model"
    with boundary(what, remedy=remedy):
        if folder is not None and folder.is_dir():
            check_folder(folder)
            check_config(folder)
        loaded = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    # With ``output_loading_info``, transformers returns a pair.
    model, *information = loaded if isinstance(loaded, tuple) else (loaded,)
    if implied:
        shares = not divides_heads(mla_layers(model))
    accelerate(model, backend=backend, cache_dtype=cache_dtype, cuda_graphs=cuda_graphs, context_parallel=shares)
    if kwargs.get("attn_implementation") is not None:
        model.set_attn_implementation(kwargs["attn_implementation"])
    return (model, *information) if information else model


def accelerate(
    model: Any,
    *,
    backend: str = "auto",
    cache_dtype: str | None = None,
    cuda_graphs: bool = True,
    context_parallel: bool = False,
) -> Any:
    """Change a loaded model in place so that it decodes over its latent cache.

    The model, its MLA layers and its norms become instances of subclasses of their classes. The weights, the state dict
    and the files that ``save_pretrained`` writes do not change. ``model.set_attn_implementation("eager")`` (or
    ``"sdpa"``, …) turns the layers back into transformers' own, and ``"latent_attention"`` into fast ones again.

    Args:
        model: a transformers model with MLA layers, with any head.
        backend: see ``load``.
        cache_dtype: see ``load``.
        cuda_graphs: see ``load``.
        context_parallel: see ``load``. The model must lie on the CPU, or on the GPU of the process's own number.

    Returns:
        ``model``.

    Raises:
        TransmlaError: if ``model`` is no transformers model, if it has no MLA layer with transformers' ``expand_kv``,
            if ``backend`` or ``cache_dtype`` is unknown, if a model with sliding windows is to cache float8 latents, if
            the latents underflow in float16, or if processes cannot share the caches of the model as it was loaded.
    """
    from transmla.runtime.class_swap import turn_into
    from transmla.runtime.context_parallel import connect, generate_together
    from transmla.runtime.decode_graphs import DecodeGraphs
    from transmla.runtime.fused_norms import fuse_norms
    from transmla.runtime.graphed_model import use_graphs
    from transmla.runtime.latent_attention import LATENT_ATTENTION, WEIGHTS_REMEDY, LatentAttention, latent_class
    from transmla.runtime.underflow import refuse_underflow

    if backend != "auto":
        lookup("transmla.kernels", "BACKEND", backend, kind="backend")
    layers = _checked_layers(model, cache_dtype)
    for layer in layers:
        refuse_underflow(layer)
    ranks = connect(model, layers) if context_parallel else Ranks()
    for layer in layers:
        if not isinstance(layer, LatentAttention):
            plain: Any = type(layer)
            turn_into(layer, latent_class(plain))
        layer.running = {}
        layer.packed = cache_dtype is not None
        layer.ranks = ranks
        layer.warns = layer is layers[0]
        layer.choose = partial(_choose, backend)
        layer.placed_for = None
    fuse_norms(model, layers[0].config)
    _log_backends(layers)
    model.set_attn_implementation(LATENT_ATTENTION)
    use_graphs(model, DecodeGraphs() if cuda_graphs else None)
    generate_together(model, ranks)
    if model.config.output_attentions:
        warnings.warn(WEIGHTS_REMEDY, stacklevel=2)
    return model


def _checked_layers(model: Any, cache_dtype: str | None) -> list[Any]:
    """Return the MLA layers of ``model``, which can cache latents as ``cache_dtype``.

    Raises:
        TransmlaError: if ``model`` is no transformers model, if there are none, or if they cannot.
    """
    refuse_other_objects(model, "accelerate()")
    layers = mla_layers(model)
    if not layers:
        raise TransmlaError(
            f"{type(model).__name__} has no MLA layer to accelerate",
            limit="the attention must cache a latent and have transformers' `expand_kv` method",
            remedy="convert the model with `transmla convert`, then load the export",
        )
    if cache_dtype not in (None, FLOAT8):
        raise TransmlaError(
            f"unknown cache_dtype '{cache_dtype}'",
            limit=f"supported: {FLOAT8}",
            remedy="use that, or leave out cache_dtype",
        )
    if cache_dtype is not None and any(getattr(layer, "sliding_window", None) for layer in layers):
        raise TransmlaError(
            f"{type(model).__name__} has sliding windows",
            limit="float8 rows need a cache that keeps all tokens",
            remedy="leave out cache_dtype",
        )
    return layers


def _log_backends(layers: list[Any]) -> None:
    """Choose the backends of all ``layers`` whose weights they can read, and log them."""
    from transmla.runtime.absorbed import reads_weight

    names = set()
    for layer in layers:
        weight = getattr(layer.kv_b_proj, "weight", None)
        if weight is not None and reads_weight(layer.kv_b_proj, weight.dtype, weight.device):
            layer.choose(layer)
            names.add(f"'{layer.backend.name}': {layer.backend.summary}")
        else:
            names.add("transformers' own expansion: kv_b_proj is quantised, adapted or hooked")
    _log.info("decoding with %s", "; ".join(sorted(names)))


def refuse_other_objects(model: Any, caller: str) -> None:
    """Raise a TransmlaError if ``model`` is a path, a single layer or anything else but a transformers model."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "set_attn_implementation"):
        raise TransmlaError(
            f"{caller} got an object of type {type(model).__name__}",
            limit="it takes a whole transformers model, as from_pretrained() returns it",
            remedy="give the model itself; transmla.load opens the folder of an export",
        )


def mla_layers(model: Any) -> list[Any]:
    """Return the attention modules of ``model`` that cache a latent and have transformers' ``expand_kv``."""
    return [module for module in model.modules() if hasattr(module, "kv_b_proj") and hasattr(module, "expand_kv")]


def _choose(backend: str, layer: Any) -> None:
    """Give ``layer`` a backend that serves the current dtype and device of its weights."""
    shape = _shape(layer)
    layer.backend = choose_for_device(backend, shape)
    layer.decode = compilable(layer.backend)
    layer.placed_for = shape.dtype, shape.device


def _shape(layer: Any) -> DecodeShape:
    """Return the shape that a backend must serve for ``layer``, with the current dtype and device of its weights."""
    weight: torch.Tensor = layer.kv_b_proj.weight
    return DecodeShape(layer.num_heads, layer.kv_lora_rank, layer.qk_rope_head_dim, weight.dtype, weight.device)


def require_backend(model: Any, name: str) -> None:
    """Check that a backend serves all MLA layers of ``model``, for callers that accept no other one.

    ``load`` and ``accelerate`` log why a backend cannot serve a model, and take the next one.

    Args:
        model: a model, accelerated or not.
        name: name of the backend, or ``auto``, which every model passes.

    Raises:
        TransmlaError: if there is no such backend, or if it does not serve a layer.
    """
    if name == "auto":
        return
    backend: Backend = lookup("transmla.kernels", "BACKEND", name, kind="backend")
    for layer in mla_layers(model):
        reason = backend.refuses(_shape(layer)) if hasattr(layer.kv_b_proj, "weight") else None
        if reason is not None:
            raise TransmlaError(
                f"backend '{name}' cannot serve this model", limit=reason, remedy="choose another backend, or auto"
            )


@cache
def choose_for_device(name: str, shape: DecodeShape) -> Backend:
    """Return ``choose_backend(name, shape)``, cached so that the log names a backend that refuses only once."""
    return choose_backend(name, shape)
