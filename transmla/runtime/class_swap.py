"""Modules that become instances of subclasses of their classes, in place."""

from __future__ import annotations

from types import MethodType
from typing import Any


def turn_into(module: Any, made: Any) -> None:
    """Make ``module`` an instance of ``made``, a subclass of its class.

    On several devices, accelerate has replaced the ``forward`` of all modules by one that moves tensors and then calls
    the former ``forward``, which is bound. That of ``made`` takes its place.
    """
    former = module.__dict__.get("_old_forward")
    if getattr(former, "__func__", None) is type(module).forward:
        module._old_forward = MethodType(made.forward, module)
    module.__class__ = made


def class_below(module: Any, mixin: type) -> Any:
    """Return the class before which ``mixin`` was placed, also where torch subclassed the class of ``module`` since.

    Parametrised and sharded modules are instances of such subclasses.
    """
    mro = type(module).__mro__
    return mro[mro.index(mixin) + 1]
