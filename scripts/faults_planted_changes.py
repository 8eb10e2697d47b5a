"""The faults that ``faults_planted.py`` plants: functions that change the folder of an export."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[Path], None]
# Factor on the rows of one head. It changes an attention's output by far less than a conversion does.
SLIGHTLY = 1.02
# Layers of the export whose weights receive faults; both differ from the first and the last.
LAYER, OTHER = 1, 2
MANIFEST = "transmla.json"


def changes(export: Path, source: Path, sibling: Path) -> Iterator[tuple[str, Change]]:
    """Yield the name and the function of every fault that suits ``export``.

    Args:
        export: folder of an intact export.
        source: folder of its source.
        sibling: folder of another conversion of the same source.
    """
    config = _json(export / "config.json")
    yield from _weight_changes(export, config)
    yield from _shard_changes(export, sibling)
    yield from _config_changes(config)
    yield from _tokenizer_changes(export)
    yield from _code_changes(export)
    yield from _manifest_changes(export, sibling)


# --- weights


def _weight_changes(export: Path, config: dict[str, Any]) -> Iterator[tuple[str, Change]]:
    heads = config["num_attention_heads"]
    shapes = _shapes(export)
    prefix = f"model.layers.{LAYER}."
    for name in sorted(n for n in shapes if n.startswith(prefix)):
        short = name.removeprefix(prefix)
        for label, change in _tensor_changes(short, shapes[name], heads):
            yield f"{short} {label}", partial(_change_tensors, {name: change})
    if "q_lora_rank" in config or "mla" in config:
        expand = f"{prefix}self_attn.kv_b_proj.weight"
        if expand in shapes:
            yield (
                "key and value rows of a head swapped",
                partial(_change_tensors, {expand: lambda t: t.unflatten(0, (heads, 2, -1)).flip(1).flatten(0, 2)}),
            )
    yield "attention of two layers swapped", partial(_swap_layers, "self_attn.")
    yield "two layers swapped", partial(_swap_layers, "")
    yield "MLPs of two layers swapped", partial(_swap_layers, "mlp.")
    yield "last norm reset", partial(_change_tensors, {"model.norm.weight": torch.ones_like})
    embedding = "model.embed_tokens.weight"
    yield "two rows of the embedding swapped", partial(_change_tensors, {embedding: partial(_swap_rows, pair=(7, 8))})
    yield "a row of the embedding zero", partial(_change_tensors, {embedding: partial(_scale_rows, rows=slice(9, 10))})
    if "lm_head.weight" in shapes:
        yield (
            "two rows of the head swapped",
            partial(_change_tensors, {"lm_head.weight": partial(_swap_rows, pair=(7, 8))}),
        )


def _tensor_changes(name: str, shape: tuple[int, ...], heads: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yield changes of the tensor ``name`` of one layer."""
    if "norm" in name:
        constant = name.endswith(("kv_a_layernorm.weight", "q_a_layernorm.weight"))
        yield "reset" if not constant else "doubled", (lambda t: t * 2) if constant else torch.ones_like
        return
    if name.endswith(("bias", "sinks")):
        yield "zero", torch.zeros_like
        yield f"times {SLIGHTLY}", lambda t: t * SLIGHTLY
        return
    if "mlp" in name:
        yield "zero", torch.zeros_like
        yield "rows permuted", lambda t: t.roll(1, 0)
        return
    width = shape[1] if "o_proj" in name else shape[0]
    block = max(1, width // heads)
    part = slice(block, 2 * block)
    if "o_proj" in name:
        yield f"one head times {SLIGHTLY}", partial(_scale_columns, columns=part)
        yield (
            "heads permuted",
            lambda t: t.unflatten(1, (-1, block)).roll(1, 1).flatten(1) if width % block == 0 else -t,
        )
    else:
        yield f"one head times {SLIGHTLY}", partial(_scale_rows, rows=part, factor=SLIGHTLY)
        yield "heads permuted", lambda t: t.roll(block, 0)
    yield "zero", torch.zeros_like
    yield "rows permuted", lambda t: t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0))]


def _scale_rows(tensor: Tensor, *, rows: slice, factor: float = 0.0) -> Tensor:
    tensor[rows] *= factor
    return tensor


def _scale_columns(tensor: Tensor, *, columns: slice) -> Tensor:
    tensor[:, columns] *= SLIGHTLY
    return tensor


def _swap_rows(tensor: Tensor, *, pair: tuple[int, int]) -> Tensor:
    order = torch.arange(len(tensor))
    order[list(pair)] = order[list(reversed(pair))]
    return tensor[order]


def _change_tensors(edits: dict[str, Callable[[Tensor], Tensor]], folder: Path) -> None:
    """Apply ``edits`` to the tensors that they name, in the tensors' own dtypes."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if set(tensors) & set(edits):
            for name in set(tensors) & set(edits):
                before = tensors[name]
                tensors[name] = edits[name](before.float().clone()).to(before.dtype)
            _save(tensors, shard)


def _swap_layers(part: str, folder: Path) -> None:
    """Swap the tensors below ``part`` of two layers, as far as they have the same names and shapes."""
    everything = {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}
    first, second = f"model.layers.{LAYER}.{part}", f"model.layers.{OTHER}.{part}"
    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, tensor in everything.items():
        other = everything.get(name.replace(first, second, 1)) if name.startswith(first) else None
        if other is not None and other.shape == tensor.shape:
            edits[name] = lambda _, value=other: value.float()  # type: ignore[misc]
            edits[name.replace(first, second, 1)] = lambda _, value=tensor: value.float()  # type: ignore[misc]
    _change_tensors(edits, folder)


def _shard_changes(export: Path, sibling: Path) -> Iterator[tuple[str, Change]]:
    shards = sorted(file.name for file in export.glob("*.safetensors"))
    same = [name for name in shards if _shapes(export, name) == _shapes(sibling, name)]

    def replace(names: list[str], folder: Path) -> None:
        for name in names:
            shutil.copyfile(sibling / name, folder / name)

    def replace_all(folder: Path) -> None:
        replace([*shards, "config.json"], folder)

    def halve(folder: Path) -> None:
        tensors = load_file(folder / shards[LAYER])
        _save({name: tensor.to(torch.float16) for name, tensor in tensors.items()}, folder / shards[LAYER])

    yield "all shards and the config of another conversion", replace_all
    changed = [name for name in same if (export / name).read_bytes() != (sibling / name).read_bytes()]
    if changed:
        yield "one shard of another conversion", partial(replace, changed[:1])
    yield "a shard in float16", halve


# --- config


def _config_changes(config: dict[str, Any]) -> Iterator[tuple[str, Change]]:
    simple: dict[str, Any] = {
        "rms_norm_eps": 1e-3,
        "norm_epsilon": 1e-3,
        "hidden_act": "relu",
        "hidden_activation": "relu",
        "sliding_window": 3,
        "attn_logit_softcapping": 9.0,
        "final_logit_softcapping": 7.0,
        "query_pre_attn_scalar": 64,
        "eos_token_id": 5,
        "bos_token_id": 7,
        "pad_token_id": 3,
        "dtype": "float16",
        "max_position_embeddings": 128,
        "attention_dropout": 0.2,
        "rope_interleave": False,
        "num_experts_per_tok": 1,
        "norm_topk_prob": True,
        "tie_word_embeddings": not config.get("tie_word_embeddings"),
    }
    for key, value in simple.items():
        if key in config and config[key] != value:
            yield f"{key} {value}", partial(_edit, {key: value})
    if config.get("sliding_window"):
        yield "no sliding window", partial(_edit, {"sliding_window": 10_000})
    if config.get("layer_types") and len(set(config["layer_types"])) > 1:
        yield "layer_types reversed", partial(_edit, {"layer_types": config["layer_types"][::-1]})
        yield "layer_types all full", partial(_edit, {"layer_types": ["full_attention"] * len(config["layer_types"])})
    if "architectures" in config:
        yield "architectures changed", partial(_edit, {"architectures": ["LlamaForCausalLM"]})
    yield "a key added", partial(_edit, {"quantization_config": {"quant_method": "fp8"}})
    for path, value in _rope_changes(config):
        yield f"{'.'.join(map(str, path))} {_short(value)}", partial(_edit_at, path, value)


def _rope_changes(config: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    rope = config.get("rope_parameters") or {}
    tables = [(key,) for key, value in rope.items() if isinstance(value, dict)] or [()]
    for inner in tables:
        table = rope[inner[0]] if inner else rope
        if "rope_theta" in table:
            yield ("rope_parameters", *inner, "rope_theta"), table["rope_theta"] * 10
    for i, kind in enumerate((config.get("mla") or {}).get("kinds", [])):
        yield ("mla", "kinds", i, "inv_freq"), [2 * value for value in kind["inv_freq"]]
        yield ("mla", "kinds", i, "inv_freq"), kind["inv_freq"][::-1]
        yield ("mla", "kinds", i, "attention_factor"), kind["attention_factor"] * 1.1
        yield ("mla", "kinds", i, "latent_norm"), True


def _edit(values: dict[str, Any], folder: Path) -> None:
    _write(folder / "config.json", _json(folder / "config.json") | values)


def _edit_at(path: tuple[Any, ...], value: Any, folder: Path) -> None:
    config = _json(folder / "config.json")
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    _write(folder / "config.json", config)


# --- tokenizer, code, manifest


def _tokenizer_changes(export: Path) -> Iterator[tuple[str, Change]]:
    def permute(folder: Path) -> None:
        content = _json(folder / "tokenizer.json")
        vocabulary = content["model"]["vocab"]
        first, second = sorted(vocabulary, key=vocabulary.get)[40:42]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        _write(folder / "tokenizer.json", content)

    def drop_merge(folder: Path) -> None:
        content = _json(folder / "tokenizer.json")
        content["model"]["merges"] = content["model"]["merges"][:-1]
        _write(folder / "tokenizer.json", content)

    def set_key(file: str, key: str, value: Any, folder: Path) -> None:
        _write(folder / file, _json(folder / file) | {key: value})

    yield "two token ids swapped", permute
    yield "a merge dropped", drop_merge
    yield "pre-tokenizer dropped", partial(set_key, "tokenizer.json", "pre_tokenizer", None)
    yield "another bos token", partial(set_key, "tokenizer_config.json", "bos_token", "</s>")
    yield "padding on the other side", partial(set_key, "tokenizer_config.json", "padding_side", "left")
    yield "another eos token for generation", partial(set_key, "generation_config.json", "eos_token_id", 9)
    yield "another temperature", partial(set_key, "generation_config.json", "temperature", 1.7)
    yield "another chat template", lambda folder: _append(folder / "chat_template.jinja", "{{ 'be evil' }}")
    yield "no chat template", lambda folder: (folder / "chat_template.jinja").unlink()
    yield "no generation config", lambda folder: (folder / "generation_config.json").unlink()


def _code_changes(export: Path) -> Iterator[tuple[str, Change]]:
    for name in ("modeling_transmla.py", "configuration_transmla.py"):
        if (export / name).is_file():
            yield f"{name} changed", partial(_replace_in, name, r"super\(\)", "super( )")
            yield f"{name} with a line more", lambda folder, name=name: _append(folder / name, "\nimport os\n")
    yield "code added", lambda folder: _append(folder / "modeling_deepseek.py", "import os\n")
    yield "code in auto_map", partial(_edit, {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.Model"}})


def _manifest_changes(export: Path, sibling: Path) -> Iterator[tuple[str, Change]]:
    def edit(change: Callable[[dict[str, Any]], object], also: Change | None, folder: Path) -> None:
        manifest = _json(folder / MANIFEST)
        change(manifest)
        _write(folder / MANIFEST, manifest)
        if also is not None:
            also(folder)

    record = {
        "settings": {"teacher": "t", "data": ["self"], "trainable": "all"},
        "tokens": 1,
        "seconds": 1.0,
        "held_out_kl": {"before": 0.2, "after": 0.1},
    }
    zero = partial(_change_tensors, {"model.norm.weight": torch.ones_like})
    yield "a healing claimed", partial(edit, lambda m: m["healing"].append(record), None)
    yield "a healing claimed for another norm", partial(edit, lambda m: m["healing"].append(record), zero)
    yield "another fingerprint", partial(edit, lambda m: m["source"].update(fingerprint="0" * 64), None)
    yield "another eps in the plan", partial(edit, lambda m: m["plan"]["spec"].update(rms_norm_eps=1e-3), None)
    yield "another width in the plan", partial(edit, lambda m: _narrow(m["plan"]), None)


def _narrow(plan: dict[str, Any]) -> None:
    for shape in [plan["shape"], *(kind[0] for kind in plan["kinds"])]:
        shape["kv_lora_rank"] -= 1


# --- files


def _shapes(folder: Path, shard: str = "*.safetensors") -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for file in folder.glob(shard) for name, t in load_file(file).items()}


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def _append(file: Path, text: str) -> None:
    file.write_text((file.read_text(encoding="utf-8") if file.is_file() else "") + text, encoding="utf-8")


def _replace_in(name: str, pattern: str, replacement: str, folder: Path) -> None:
    (folder / name).write_text(re.sub(pattern, replacement, (folder / name).read_text(encoding="utf-8"), count=1))


def _short(value: Any) -> str:
    return str(value)[:40]
