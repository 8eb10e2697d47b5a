"""Checks of an export against its source, for ``transmla verify --source``."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.boundary import read_json_object
from transmla.export.hashes import EVALUATION, UNHASHED, export_files
from transmla.export.manifest import Manifest, versions
from transmla.export.tokenizer import write_tokenizer
from transmla.export.travel import KEY as RECORD
from transmla.formats.base import format_named
from transmla.formats.model_checks import Check
from transmla.guard.folder import INDEX
from transmla.guard.headers import shards_of
from transmla.signature.compare import CLOSE, compare_with_source, differences
from transmla.signature.sign import Measured, measure_source
from transmla.signature.tokenizer import describe_tokenizer
from transmla.source.checkpoint import open_checkpoint
from transmla.source.load import load_tokenizer
from transmla.source.open_source import default_generation, open_path

# Names of the checks, in order.
NAMES = (
    "source",
    "config of the source",
    "files of the source",
    "untouched weights",
    "source layers as signed",
    "distance to the source as signed",
)
# Files of an export that record how it was made; no program reads them.
RECORDS = (*UNHASHED, EVALUATION, "recipe.yaml", "healing.yaml", "healing.png")
# Fields of a spec in which a source must equal the converted model for its layers to be comparable.
SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
# Keys of a config that depend on where or with what the source is read, not on the model.
UNSTABLE = ("transformers_version", "_name_or_path")


class SourceChecks:
    """The checks of one export against its source.

    Args:
        folder: folder of the export.
        manifest: its manifest.
        path: local path of the source.
        device: the device that runs single layers.
        allow_pickle: whether pickled weights may be opened.

    Raises:
        TransmlaError: if the source cannot be opened.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, path: Path, device: torch.device | str, *, allow_pickle: bool
    ) -> None:
        self.folder, self.manifest, self.device = folder, manifest, device
        self.source = open_path(path, allow_pickle=allow_pickle)
        self.form = format_named(manifest.format)

    def run(self, measured: Measured | None) -> Iterator[Check]:
        """Yield the checks. ``measured`` is what the export's layers compute, if it is signed."""
        fingerprint = self.source.checkpoint.fingerprint()
        same = fingerprint == self.manifest.source.fingerprint
        yield Check("source", same, "the weights are the converted ones" if same else "other weights were converted")
        yield self._config()
        yield self._files()
        yield self._untouched()
        signature = self.manifest.signature
        planned, spec = self.manifest.plan.spec, self.source.spec
        if any(getattr(planned, field) != getattr(spec, field) for field in SHAPE):
            yield Check("distance to the source as signed", False, "no comparison: the layers have other shapes")
            return
        if signature is None or measured is None or not signature.source:
            yield Check("distance to the source as signed", True, "no comparison: it is not signed")
            return
        layers = measure_source(self.source, self.device)
        yield from compare_with_source(
            signature, measured.layers, layers, experts=bool(self.manifest.plan.spec.experts)
        )

    def _config(self) -> Check:
        """Make the config again from the source and the plan, and compare it with the export's."""
        manifest = self.manifest
        made = _plain(self.form.config(self.source.config, manifest.converted_plan))
        found = read_json_object(self.folder / "config.json") or {}
        for key in (*UNSTABLE, RECORD):
            made.pop(key, None), found.pop(key, None)
        wrong = differences(made, found, close=CLOSE)
        if manifest.resaved or manifest.versions.get("transformers") != versions()["transformers"]:
            # Versions of transformers, and its save_pretrained, write other defaults.
            wrong = [line for line in wrong if not line.endswith(("was added", "is missing"))]
        planned, spec = (_plain(vars(part)) for part in (manifest.plan.spec, self.source.spec))
        # Older manifests count a tied head twice, and say only whether there are experts. The numbers serve estimates.
        for part in (planned, spec):
            part.pop("other_parameters"), part.pop("experts_per_token")
            part["experts"] = bool(part["experts"])
        wrong += [f"plan: {line}" for line in differences(spec, planned, close=CLOSE)]
        return Check("config of the source", not wrong, "; ".join(wrong[:3]) or "equal to the one made again")

    def _files(self) -> Check:
        """Write the tokenizer, the templates, the generation config and the code again, and compare the files.

        Of an export that other software has saved again, only what the tokenizer does is compared.
        """
        if self.manifest.resaved:
            ours, theirs = (describe_tokenizer(load_tokenizer(path)) for path in (self.folder, self.source.path))
            wrong = differences(theirs, ours)
            return Check("files of the source", not wrong, "; ".join(wrong[:3]) or "the tokenizer does the same")
        with tempfile.TemporaryDirectory() as name:
            again = Path(name)
            self.form.write_code(again)
            # The choice between copying and saving the tokenizer depends on the export's type of model.
            shutil.copyfile(self.folder / "config.json", again / "config.json")
            write_tokenizer(
                again,
                self.source.checkpoint.folder,
                load_tokenizer(self.source.path),
                copy=self.source.checkpoint.gguf is None,
                generation=default_generation(self.source),
            )
            wrong = self._compare_files(again)
        return Check(
            "files of the source", not wrong, "; ".join(wrong[:3]) or "tokenizer, templates and code are equal"
        )

    def _compare_files(self, again: Path) -> list[str]:
        """Compare the export's files that are no weights and no records with those written ``again``."""
        made, listed = set(export_files(again)), set(export_files(self.folder))
        others = listed - {*RECORDS, "config.json", INDEX, *shards_of(self.folder)}
        wrong = [f"{name} is missing" for name in sorted(made - listed)]
        for name in sorted(others):
            # A licence and the like are copied as they are.
            origin = again / name if name in made else self.source.checkpoint.folder / name
            if not origin.is_file():
                wrong.append(f"{name} is not of the source")
            elif not self._equal(self.folder / name, origin):
                wrong.append(f"{name} differs")
        return wrong

    def _equal(self, file: Path, origin: Path) -> bool:
        """Return whether a file equals ``origin``, whichever version of transformers wrote it."""
        if file.read_bytes() == origin.read_bytes():
            return True
        other_version = self.manifest.versions.get("transformers") != versions()["transformers"]
        if file.suffix == ".py":
            # Another version's code is compared with the signature alone.
            return self.manifest.signature is None or self.manifest.versions["transmla"] != versions()["transmla"]
        if not other_version or file.suffix != ".json":
            return False
        if self.source.checkpoint.gguf is not None:
            return describe_tokenizer(load_tokenizer(self.folder)) == describe_tokenizer(
                load_tokenizer(self.source.path)
            )
        # The class is written where transformers would choose another one.
        wrong = differences(read_json_object(file), read_json_object(origin))
        return file.name == "tokenizer_config.json" and all(line.startswith("tokenizer_class ") for line in wrong)

    def _untouched(self) -> Check:
        """Compare each tensor that the conversion copies with the source's, bit by bit after the cast."""
        manifest, name = self.manifest, "untouched weights"
        if any(record["settings"]["trainable"] == "all" for record in manifest.healing):
            return Check(name, True, "no comparison: a healing trained all weights")
        original, export = self.source.checkpoint, open_checkpoint(self.folder)
        names = self.form.untouched(manifest.plan, original.shapes, export.shapes, attention=not manifest.healing)
        factors = self.form.corrections(manifest.layers, manifest.final_norm_correction)
        pairs = names | {norm: norm for norm in factors}
        changed = [
            ours
            for ours, theirs in pairs.items()
            if ours not in export.shapes
            or theirs not in original.shapes
            or not _identical(export.read(ours), self._written(ours, original.read(theirs), factors.get(ours)))
        ]
        detail = f"{len(changed)} differ, first {changed[0]}" if changed else f"{len(pairs)} tensors are bit-identical"
        return Check(name, bool(names) and not changed, detail)

    def _written(self, name: str, tensor: Tensor, factor: float | None) -> Tensor:
        """Return a ``tensor`` of the source as the conversion writes it under ``name``."""
        dtype: torch.dtype = getattr(torch, self.manifest.plan.dtype)
        if factor is not None:
            return (tensor.double() * factor).to(dtype)
        kept = any(name.startswith(f"model.layers.{i}.") for i in self.manifest.plan.kept)
        if ".self_attn." in name and not kept:
            return tensor.to(dtype)
        return self.form.cast(tensor, dtype, getattr(torch, self.source.dtype))


def _identical(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON gives it back."""
    return json.loads(json.dumps(value, default=vars))
