"""Model classes whose ``forward`` takes decode steps from CUDA graphs."""

from __future__ import annotations

import functools
from functools import cache
from typing import Any

import torch
from transformers import GenerationMixin

from transmla.runtime.class_swap import class_below
from transmla.runtime.decode_graphs import DecodeGraphs

# Attribute that holds the graphs of a model.
GRAPHS = "_decode_graphs"
# Method by which ``generate()`` makes the mask of the next token: ones are appended to the last mask.
CONTINUE = "_update_model_kwargs_for_generation"


class GraphedModel:
    """Mixin placed before a model's class by ``graphed_class``."""

    def __reduce__(self) -> Any:
        """Pickle the class below this one, which ``graphed_class`` creates at run time."""
        plain: Any = class_below(self, GraphedModel)
        if plain.__reduce__ is object.__reduce__:
            return _graphed, (_bare, (plain,)), self.__dict__
        bare, arguments, *state = plain.__reduce__(self)
        return _graphed, (bare, arguments), *state


@cache
def graphed_class(plain: Any) -> Any:
    """Return a subclass of a model class ``plain`` that runs decode steps from graphs.

    Name and module are those of ``plain``, because transformers looks both up: in ``config.architectures``, and in its
    table of the outputs that a class can record.
    """

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        graphs = None if torch.compiler.is_compiling() else getattr(self, GRAPHS, None)
        if graphs is None:
            return plain.forward(self, *args, **kwargs)
        return graphs.forward(plain.forward, self, args, kwargs)

    body = {"forward": forward, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    if getattr(plain, CONTINUE, None) is getattr(GenerationMixin, CONTINUE):

        @functools.wraps(getattr(plain, CONTINUE))
        def update(self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
            mask = model_kwargs.get("attention_mask")
            updated: dict[str, Any] = getattr(plain, CONTINUE)(self, outputs, model_kwargs, *args, **kwargs)
            graphs = graphs_of(self)
            if graphs is not None and mask is not None:
                graphs.masks.extend(mask, updated.get("attention_mask"))
            return updated

        body[CONTINUE] = update
    return type(plain.__name__, (GraphedModel, plain), body)


def use_graphs(model: Any, graphs: DecodeGraphs | None) -> None:
    """Make ``model`` take its decode steps from ``graphs``; None makes it run all steps eagerly."""
    if graphs is not None and not isinstance(model, GraphedModel):
        plain: Any = type(model)
        model.__class__ = graphed_class(plain)
    if isinstance(model, GraphedModel):
        setattr(model, GRAPHS, graphs)


def graphs_of(model: Any) -> DecodeGraphs | None:
    """Return the graphs from which ``model`` takes its decode steps, or None."""
    graphs: DecodeGraphs | None = getattr(model, GRAPHS, None)
    return graphs


def _bare(plain: Any) -> Any:
    return plain.__new__(plain)


def _graphed(bare: Any, arguments: tuple[Any, ...]) -> Any:
    """An instance without state, for unpickling: ``bare(*arguments)`` with its graphed class."""
    model = bare(*arguments)
    plain: Any = type(model)
    model.__class__ = graphed_class(plain)
    return model
