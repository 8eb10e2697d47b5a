"""Count attempts of a downloaded folder to run its code.

    python scripts/faults_code.py --json FILE

Code is planted where transformers, PyTorch, YAML or Jinja may run it, sometimes after a yes on standard input. Every
verb that reads the folder runs on it, in a forked process, with an empty standard input and with one that says yes. The
planted code writes a file, and an attempt has succeeded if the file exists.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_run
from fuzz_run import HEAL, TEXT

MARK = "RAN"
# A module whose import writes the file, with classes of all kinds that a config may name.
MODULE = """open({mark!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Mine(PreTrainedTokenizerFast): pass
class MyConfig(LlamaConfig): model_type = "mine"
class MyModel(LlamaForCausalLM): config_class = MyConfig
def generate(*args, **kwargs): pass
"""
YES = b"y\n" * 50


def _edit(file: Path, **changes: object) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | changes))


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def _config(**auto_map: str) -> Callable[[Path, Path], None]:
    """Name classes in config.json. Only they know the type ``mine``."""
    return lambda folder, _: _edit(folder / "config.json", auto_map=auto_map, model_type="mine")


def _known(**auto_map: str) -> Callable[[Path, Path], None]:
    return lambda folder, _: _edit(folder / "config.json", auto_map=auto_map)


def _tokenizer(value: object) -> Callable[[Path, Path], None]:
    return lambda folder, _: _edit(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": value}, tokenizer_class="Mine"
    )


def _setting(name: str, value: object, file: str = "config.json") -> Callable[[Path, Path], None]:
    return lambda folder, _: _edit(folder / file, **{name: value})


def _own_generation(folder: Path, mark: Path) -> None:
    _write(folder / "custom_generate" / "generate.py", MODULE.format(mark=str(mark)))
    _edit(folder / "generation_config.json", custom_generate=".")


def _template(folder: Path, mark: Path) -> None:
    """A template that leaves Jinja's sandbox, if there is none."""
    code = f'{{{{ cycler.__init__.__globals__.os.system("touch {mark}") }}}}'
    _write(folder / "chat_template.jinja", code)
    _edit(folder / "tokenizer_config.json", chat_template=code)


class _Planted:
    """An object whose unpickling writes the file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def _pickle(folder: Path, mark: Path) -> None:
    import torch

    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    torch.save({"model.norm.weight": _Planted(mark)}, folder / "pytorch_model.bin")


def _code_files(folder: Path, mark: Path) -> None:
    for name in ("configuration_transmla.py", "modeling_transmla.py"):
        _write(folder / name, MODULE.format(mark=str(mark)))


def _recipe(folder: Path, mark: Path) -> None:
    _write(folder / "recipe.yaml", f"source: !!python/object/apply:os.system ['touch {mark}']\noutput: out\n")


BOTH = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
# Places for code in a source.
IN_SOURCE: dict[str, Callable[[Path, Path], None]] = {
    "tokenizer, two classes": _tokenizer(["mine.Mine", "mine.Mine"]),
    "tokenizer, the fast class": _tokenizer([None, "mine.Mine"]),
    "tokenizer, one name": _tokenizer("mine.Mine"),
    "tokenizer of another repository": _tokenizer(["org/mine--mine.Mine", None]),
    "config": _config(AutoConfig="mine.MyConfig"),
    "config and model": _config(**BOTH),
    "config of a known type": _known(AutoConfig="mine.MyConfig"),
    "model of a known type": _known(AutoModelForCausalLM="mine.MyModel"),
    "config and model of a known type": _known(**BOTH),
    "tokenizer in the config": _known(AutoTokenizer="mine.Mine"),
    "model of another repository": _known(AutoModelForCausalLM="org/mine--mine.MyModel"),
    "attention of the Hub": _setting("_attn_implementation", "org/kernel"),
    "experts of the Hub": _setting("_experts_implementation", "org/kernel"),
    "processor": _setting("auto_map", {"AutoProcessor": "mine.Mine"}, "processor_config.json"),
    "generation": _own_generation,
    "chat template": _template,
    "pickle": _pickle,
    "recipe": _recipe,
}
# Places for code in an export of the transmla format, whose own code files transformers runs on demand.
IN_EXPORT: dict[str, Callable[[Path, Path], None]] = {"code files of an export": _code_files, **IN_SOURCE}


@dataclass(frozen=True)
class Attempt:
    """One command on one folder with planted code.

    Attributes:
        place: where the code is.
        verb: name of the command.
        yes: whether standard input says yes.
        ran: whether the code ran.
        outcome: outcome of the process, as in ``fuzz_run``.
    """

    place: str
    verb: str
    yes: bool
    ran: bool
    outcome: str


def commands(root: Path, *, export: bool) -> dict[str, list[str]]:
    """Return the command lines that read the working folder: a source, or an export."""
    evaluation = ["--text", str(root / "text.txt"), "--window", "32", "--max-windows", "1", "--device", "cpu"]
    bench = ["bench", ".", "--batch", "1", "--context", "8", "--steps", "1", "--device", "cpu"]
    heal = [*("-o", "out", "--data", str(root / "text.txt")), *HEAL]
    calibration = ["--calibration", str(root / "text.txt"), *TEXT]
    shared = {"eval": ["eval", ".", *evaluation], "bench": bench, "load": ["load", "."]}
    if export:
        return shared | {
            "verify": ["verify", ".", "--source", str(root / "qwen3")],
            "push": ["push", ".", "org/name", "--dry-run"],
            "student": ["heal", ".", "--teacher", str(root / "qwen3"), *heal],
        }
    return shared | {
        "plan": ["plan", ".", *calibration],
        "inspect": ["inspect", ".", *calibration],
        "convert": ["convert", ".", "-o", "out", "--reconstruct", "off", "--heal", "off", *calibration],
        "pickled": ["plan", ".", *calibration, "--allow-pickle"],
        "pickled eval": ["eval", ".", *evaluation, "--allow-pickle"],
        "chats": ["eval", ".", "--text", str(root / "chat.jsonl"), *evaluation[2:]],
        "baseline": ["eval", str(root / "native"), "--baseline", ".", *evaluation],
        "teacher": ["heal", str(root / "native"), "--teacher", ".", *heal],
        "verify": ["verify", str(root / "native"), "--source", "."],
        "recipe": ["plan", "recipe.yaml"],
    }


def attempts(root: Path, *, verbs: tuple[str, ...] | None = None, exports: bool = True) -> Iterator[Attempt]:
    """Plant code in every place, and yield what the commands did.

    Args:
        root: holds the folders of ``fuzz_run.build_bases``, or of ``build_sources`` without ``exports``.
        verbs: names of the commands; None for all.
        exports: whether to plant code in an export too.
    """
    chat = '{"messages": [{"role": "user", "content": "the cat sat"}]}\n'
    (root / "chat.jsonl").write_text(chat * 20)
    for base, places in (("llama", IN_SOURCE), ("own", IN_EXPORT if exports else {})):
        for place, plant in places.items():
            for verb, arguments in commands(root, export=base == "own").items():
                if verbs and verb not in verbs:
                    continue
                for given in (b"", YES):
                    ran, outcome = _attempt(root, base, plant, arguments, given)
                    yield Attempt(f"{base}: {place}", verb, bool(given), ran, outcome)


def _attempt(
    root: Path, base: str, plant: Callable[[Path, Path], None], arguments: list[str], given: bytes
) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory(dir=root / "runs") as name:
        folder, mark = Path(name) / "folder", Path(name) / MARK
        shutil.copytree(root / base, folder)
        (folder / "mine.py").write_text(MODULE.format(mark=str(mark)))
        plant(folder, mark)
        outcome, _ = fuzz_run.forked(arguments, folder, given)
        return mark.exists(), outcome


def counts(found: list[Attempt]) -> list[dict[str, Any]]:
    """Return the counts of attempts by place: how often the code ran, and how the processes ended."""
    rows = []
    for place in dict.fromkeys(attempt.place for attempt in found):
        here = [attempt for attempt in found if attempt.place == place]
        outcomes = [attempt.outcome for attempt in here]
        row = {"place": place, "attempts": len(here), "ran": sum(attempt.ran for attempt in here)}
        row |= {outcome: outcomes.count(outcome) for outcome in ("refused", "accepted")}
        rows.append(row | {"faults": sum(outcome in fuzz_run.FAULTS for outcome in outcomes)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return ``counts`` as a Markdown table."""
    names = list(rows[0])
    total = {"place": "all"} | {name: sum(row[name] for row in rows) for name in names[1:]}
    head = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(str(row[name]) for name in names)} |" for row in (*rows, total))])


def main() -> int:
    """Make all attempts, print the table, and return 1 if code ran or a command ended with a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the attempts with their provenance to this file")
    parser.add_argument("--commit", help="commit to record, for a copy without git history")
    given = parser.parse_args()
    with fuzz_run.bases() as root:
        found = list(attempts(root))
    print(table(counts(found)))
    wrong = [attempt for attempt in found if attempt.ran or attempt.outcome in fuzz_run.FAULTS]
    print(*wrong, sep="\n")
    if given.json:
        from provenance import write_result

        write_result(given.json, counts(found), given.commit)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
