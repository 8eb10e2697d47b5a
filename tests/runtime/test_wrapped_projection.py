"""Whatever wraps, hooks or quantises ``kv_b_proj`` is computed at every step, before and after acceleration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.behaviour import CACHES, logits_by_step, relative, stock_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import transmla
from transmla.runtime.load import mla_layers


class OnlyLinear(Tensor):
    """A weight that supports nothing but ``linear``, as weights of quantisers do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("view", "split", "einsum"):
            raise NotImplementedError(f"{name} of a quantised weight")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if name == "detach" else result


def hook(projection: nn.Linear) -> None:
    projection.register_forward_hook(lambda module, args, output: 1.3 * output)


def pre_hook(projection: nn.Linear) -> None:
    projection.register_forward_pre_hook(lambda module, args: (1.3 * args[0],))


def replaced_forward(projection: nn.Linear) -> None:
    plain = projection.forward
    projection.forward = lambda x: 1.3 * plain(x)  # type: ignore[method-assign]


def bias(projection: nn.Linear) -> None:
    projection.bias = nn.Parameter(torch.ones(projection.out_features))


def quantised(projection: nn.Linear) -> None:
    weight = (1.3 * projection.weight).detach().as_subclass(OnlyLinear)
    projection.weight = nn.Parameter(weight, requires_grad=False)


def pruned(projection: nn.Linear) -> None:
    torch.manual_seed(0)
    prune.random_unstructured(projection, "weight", 0.3)


def parametrised(projection: nn.Linear) -> None:
    parametrizations.orthogonal(projection)


WRAPPERS = (hook, pre_hook, replaced_forward, bias, quantised, pruned, parametrised)


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3"])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = stock_model(request.param, tmp_path_factory.mktemp(request.param))
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def unwrapped(stock: Any) -> Tensor:
    return logits(stock)


def logits(model: Any) -> Tensor:
    return logits_by_step(model, CACHES["dynamic"](model.config), "left")


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_wrappers_are_computed(stock: Any, unwrapped: Tensor, wrap: Callable[[Any], None]) -> None:
    model = copy.deepcopy(stock)
    # DeepSeek's model is accelerated before, and the other one after its projections are wrapped.
    if model.config.model_type == "deepseek_v3":
        transmla.accelerate(model)
        model.set_attn_implementation("eager")
    for layer in mla_layers(model):
        wrap(layer.kv_b_proj)
    expected = logits(model)
    assert relative(unwrapped, expected) > 1e-3  # the wrapper changes the logits
    if model.config.model_type == "deepseek_v3":
        model.set_attn_implementation("latent_attention")
    else:
        transmla.accelerate(model)
    assert relative(logits(model), expected) < 2e-5


def test_a_global_hook_sees_every_step(stock: Any) -> None:
    model, calls = transmla.accelerate(copy.deepcopy(stock)), []
    layer = mla_layers(model)[0]

    def seen(module: nn.Module, args: Any, output: Any) -> None:
        calls.extend([module] if module is layer.kv_b_proj else [])

    handle = nn.modules.module.register_module_forward_hook(seen)
    try:
        logits(model)
    finally:
        handle.remove()
    assert len(calls) == 3


def test_a_removed_hook_leaves_the_absorbed_form(stock: Any) -> None:
    model, calls = transmla.accelerate(copy.deepcopy(stock)), []
    handles = [layer.kv_b_proj.register_forward_hook(lambda *_: None) for layer in mla_layers(model)]
    expected = logits(model)
    for handle in handles:
        handle.remove()
    layer = mla_layers(model)[0]
    layer.choose(layer)
    decode = layer.decode
    layer.decode = lambda *args: calls.append(1) or decode(*args)
    assert relative(logits(model), expected) < 2e-5
    assert calls


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_weights_of_torchao(stock: Any, kind: str) -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    model = transmla.accelerate(copy.deepcopy(stock))
    with torch.no_grad():
        for layer in mla_layers(model):
            layer.kv_b_proj.weight.add_(1e-3)  # float8 has no scale for rows of zeros
    quantisation.quantize_(model, getattr(quantisation, kind)(), lambda _, name: "kv_b_proj" in name)
    actual = logits(model)
    model.set_attn_implementation("eager")
    assert relative(actual, logits(model)) < 2e-5


def test_an_adapter_is_computed_switched_off_and_merged(stock: Any, unwrapped: Tensor) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["kv_b_proj"], init_lora_weights=False)
    model = peft.get_peft_model(transmla.accelerate(copy.deepcopy(stock)), settings).eval()
    adapted = logits(model)
    assert relative(unwrapped, adapted) > 1e-3
    with model.disable_adapter():
        assert relative(logits(model), unwrapped) < 2e-5
    merged = model.merge_and_unload()
    assert relative(logits(merged), adapted) < 2e-5
