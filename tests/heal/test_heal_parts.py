"""Parts of a healing: natural coordinates, losses, learning rates, texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from transmla.convert.pipeline import convert
from transmla.formats.base import format_named
from transmla.heal import natural_coordinates as natural
from transmla.heal import optimiser as optimiser_module
from transmla.heal.batches import TokenStream
from transmla.heal.distributed import unwrapped
from transmla.heal.learning_rate import highest_rate, set_rates
from transmla.heal.losses import Distiller
from transmla.heal.optimiser import choose_trainable, make_optimiser, store_frozen_in_half
from transmla.heal.settings import Healing
from transmla.recipe import Recipe


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("rank", [None, 24])
def test_natural_coordinates_keep_the_logits(
    rank: int | None, make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    folder = convert(make_recipe(make_source(), cache_ratio=0.5, q_lora_rank=rank, dtype="float32"))
    model, tokens = load(folder), torch.randint(0, 128, (2, 20))
    with torch.no_grad():
        expected = model(tokens).logits
        natural.to_natural(model, format_named("native"))
        natural.measure_latents(model, format_named("native"), watching=True)
        logits = model(tokens).logits
        natural.measure_latents(model, format_named("native"), watching=False)
    assert torch.allclose(logits, expected, atol=1e-3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    back = load(folder)
    unknown = back.load_state_dict(
        natural.to_export(model, weights, format_named("native"), torch.float32), strict=True
    )
    assert not unknown.unexpected_keys
    with torch.no_grad():
        assert torch.allclose(back(tokens).logits, expected, atol=1e-3)


def parts(attention: Any) -> dict[str, torch.Tensor]:
    """Return queries, keys and values by head, latents, and pairs of rotary rows of an export's attention."""
    plain, rank = attention.qk_nope_head_dim, attention.kv_lora_rank
    projection = attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj
    queries = projection.weight.detach().view(attention.num_heads, attention.qk_head_dim, -1)
    reading = attention.kv_b_proj.weight.detach().view(attention.num_heads, -1, rank)
    cached = attention.kv_a_proj_with_mqa.weight.detach()
    return {
        "q_nope": queries[:, :plain],
        "q_pe": queries[:, plain:].unflatten(1, (-1, 2)),
        "keys": reading[:, :plain],
        "values": reading[:, plain:],
        "latents": cached[:rank],
        "pe": cached[rank:].unflatten(0, (-1, 2)),
    }


def size(x: torch.Tensor, *dims: int) -> torch.Tensor:
    return x.square().mean(dims or None).sqrt()


@pytest.mark.parametrize("rank", [None, 24])
def test_factors_of_a_product_have_equal_size_in_natural_coordinates(
    rank: int | None, make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    model = load(convert(make_recipe(make_source(), cache_ratio=0.5, q_lora_rank=rank)))
    _, before = next(natural.attentions(model))
    unbalanced = parts(before)
    assert size(unbalanced["latents"]) < 1e-3 * size(unbalanced["pe"])
    natural.to_natural(model, format_named("native"))
    for _, attention in natural.attentions(model):
        balanced = parts(attention)
        for one, other in (("q_nope", "q_pe"), ("keys", "values"), ("latents", "pe")):
            assert float(size(balanced[one])) == pytest.approx(float(size(balanced[other])), rel=1e-3)
        # In each product, both factors have the same size, up to one common ratio.
        for ratio in (
            size(balanced["q_nope"], 2) / size(balanced["keys"], 2),
            size(balanced["q_pe"], 0, 2, 3) / size(balanced["pe"], 1, 2),
        ):
            assert float(ratio.max()) == pytest.approx(float(ratio.min()), rel=1e-3)


def test_zero_rows_keep_the_logits(pair: tuple[Path, Path]) -> None:
    model, tokens = load(pair[1]), torch.randint(0, 128, (2, 20))
    with torch.no_grad():
        for _, attention in natural.attentions(model):
            views = parts(attention)
            views["keys"][0, 3] = 0
            views["pe"][1] = 0
            views["q_pe"][:, 2] = 0
        expected = model(tokens).logits
        natural.to_natural(model, format_named("native"))
        assert torch.allclose(model(tokens).logits, expected, atol=1e-3)


def test_unwrapped_removes_the_wrappers_of_accelerate() -> None:
    name = "module._orig_mod.student.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight"
    assert unwrapped(name) == "student.model.layers.0.self_attn.q_proj.weight"


class TestLosses:
    """The loss equals the written-out formulas."""

    def test_kl_and_cross_entropy(self, pair: tuple[Path, Path]) -> None:
        student, teacher = load(pair[1]), load(pair[0])
        tokens = torch.randint(0, 128, (2, 9))
        with torch.no_grad():
            ours, theirs = (m(tokens).logits.double().flatten(0, 1) for m in (student, teacher))
            distiller = Distiller(student, teacher, kl=0.7, cross_entropy=0.2, hidden=0.0, temperature=2.0)
            total, kl = distiller(tokens)
            evaluated_kl = distiller.eval()(tokens)[1]
        p, q = (ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1)
        expected = (q.exp() * (q - p)).sum(-1).mean()
        log_likelihood = ours.log_softmax(-1).view(2, 9, -1)[:, :-1].gather(-1, tokens[:, 1:, None])
        assert float(kl) == pytest.approx(float(expected), rel=1e-4)
        assert float(total) == pytest.approx(0.7 * 4 * float(expected) - 0.2 * float(log_likelihood.mean()), rel=1e-4)
        p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
        assert float(evaluated_kl) == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-4)

    def test_the_chunk_size_does_not_change_loss_or_gradient(
        self, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        student, teacher = load(pair[1]), load(pair[0])
        distiller = Distiller(student, teacher, kl=1.0, cross_entropy=0.5, hidden=0.3, temperature=1.0)
        tokens, results = torch.randint(0, 128, (2, 9)), []
        for values in (2**28, 128 * 5):
            monkeypatch.setattr("transmla.heal.losses.CHUNK_VALUES", values)
            student.zero_grad()
            loss, _ = distiller(tokens)
            loss.backward()
            results.append((loss.detach(), student.model.layers[0].self_attn.o_proj.weight.grad.clone()))
        assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
        assert torch.allclose(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("head", ["own", "tied", "frozen"])
    def test_the_gradients_are_those_of_the_formulas(
        self, head: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("transmla.heal.losses.CHUNK_VALUES", 128 * 5)
        student, teacher = load(pair[1]).double(), load(pair[0]).double()
        if head == "tied":
            student.lm_head.weight = student.model.embed_tokens.weight
        student.lm_head.weight.requires_grad_(head != "frozen")
        tokens = torch.randint(0, 128, (2, 9))
        distiller = Distiller(student, teacher, kl=0.7, cross_entropy=0.2, hidden=0.0, temperature=2.0)
        (3 * distiller(tokens)[0]).backward()
        found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        student.zero_grad()
        logits = student(tokens).logits
        with torch.no_grad():
            q = (teacher(tokens).logits / 2).log_softmax(-1)
        kl = (q.exp() * (q - (logits / 2).log_softmax(-1))).sum(-1).mean()
        likelihood = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
        (3 * (0.7 * 4 * kl - 0.2 * likelihood)).backward()
        expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        assert ("lm_head.weight" in found) == (head == "own")
        for name, gradient in expected.items():  # the logits are float32
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))

    def test_a_model_distilled_from_itself_has_no_loss(self, pair: tuple[Path, Path]) -> None:
        teacher = load(pair[0])
        loss, kl = Distiller(teacher, teacher, kl=1.0, cross_entropy=0.0, hidden=1.0, temperature=1.0)(
            torch.randint(0, 128, (2, 9))
        )
        assert abs(float(loss)) < 1e-6
        assert abs(float(kl)) < 1e-6


def settings(**changes: Any) -> Healing:
    return Healing(student="", teacher="", output="", **changes)


@pytest.mark.parametrize("trainable", ["attention", "lora"])
@pytest.mark.parametrize("tied", [False, True])
def test_frozen_weights_in_bfloat16_change_no_gradient_under_autocast(
    make_source: Callable[..., Path],
    make_recipe: Callable[..., Recipe],
    make_healing: Callable[..., Healing],
    trainable: str,
    tied: bool,
) -> None:
    source = make_source(tie_word_embeddings=tied)
    export = convert(make_recipe(source, output=str(source.with_name("export"))))
    settings = make_healing(trainable=trainable)
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        student = choose_trainable(load(export), settings)
        if half:
            store_frozen_in_half(student)
            dtypes = {name: p.dtype for name, p in student.named_parameters()}
            assert {d for n, d in dtypes.items() if ".mlp." in n and "norm" not in n} == {torch.bfloat16}
            assert {d for n, d in dtypes.items() if "norm" in n or "embed" in n} == {torch.float32}
        distiller = Distiller(student, load(source), kl=1.0, cross_entropy=0.0, hidden=0.0, temperature=1.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = distiller(torch.arange(40).view(2, 20))
        loss.backward()
        found.append([loss, *(p.grad for p in student.parameters() if p.requires_grad)])
    assert len(found[0]) > 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_size_of_a_tensor_is_measured_in_float32() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for scale in (0.01, 0.0113, 0.0127, 0.0143):
        assert optimiser_module._rms((scale * x).bfloat16()) == pytest.approx(scale * float(size(x)), rel=2e-4)


def test_learning_rates_are_relative_to_tensor_sizes(pair: tuple[Path, Path]) -> None:
    model = choose_trainable(load(pair[1]), settings(trainable="all"))
    optimiser = make_optimiser(model, settings(trainable="all", other_rate=0.5), fused=False)
    units = {id(p): group["unit"] for group in optimiser.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = float(size(parameter.detach())) * (1.0 if "self_attn" in name else 0.5)
        assert units[id(parameter)] == pytest.approx(expected, rel=0.1)
    assert len(optimiser.param_groups) < len(units)
    rates = [set_rates(optimiser, p, 100, 1e-3, 0.1) for p in (0.0, 0.05, 0.1, 0.5, 0.99)]
    assert rates[0] < rates[1] < rates[2] < 1e-3
    assert rates[2] > rates[3] > rates[4]
    assert all(group["lr"] == group["unit"] * rates[4] for group in optimiser.param_groups)


def test_warm_up_takes_at_least_ten_steps() -> None:
    optimiser = torch.optim.SGD([torch.zeros(1)])
    for group in optimiser.param_groups:
        group["unit"] = 1.0
    rise = [set_rates(optimiser, 0.5, step, 1.0, 0.1) for step in range(12)]
    assert rise[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rise[9] == rise[11] == set_rates(optimiser, 0.5, 0, 1.0, 0.0)


def test_the_peak_rate_grows_with_the_kl_and_the_batch() -> None:
    assert highest_rate(settings(learning_rate=1e-5), 0.1) == 1e-5
    rates = [highest_rate(settings(), kl) for kl in (0.0, 0.1, 0.4, 1.0, 10.0)]
    assert rates[0] == 0
    assert rates[2] == pytest.approx(2 * rates[1])
    assert rates[3] == rates[4]
    assert highest_rate(settings(batch=8), 0.1) == pytest.approx(rates[1] / 2)
    assert highest_rate(settings(batch=64), 0.1) == rates[1]


def test_an_epoch_reads_each_sequence_once() -> None:
    stream = TokenStream("stream", torch.arange(1000), length=10, held_out=5, seed=0)
    assert stream.sequences == 94
    epoch = torch.cat([stream[i] for i in range(94)])
    assert len(epoch.unique()) == 940
    assert int(epoch.max()) < 950
    assert sorted(stream.held_out.flatten().tolist()) == list(range(950, 1000))
    assert not torch.equal(stream[0], stream[94])
    rows = TokenStream("rows", torch.arange(80).view(8, 10), length=10, held_out=2, seed=0)
    assert sorted(int(rows[i][0]) for i in range(6)) == list(range(0, 60, 10))
