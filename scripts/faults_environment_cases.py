"""Environments of ``faults_environment.py``: files, names, streams, limits and disks that a user's machine may have."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz_run import HEAL, TEXT
from helpers.forked import become_nobody

# A pointer of git-lfs in place of a file.
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
OUTPUTS = (
    "/", "//", ".", "..", "x" * 300, "x" * 250, "a/" + "y" * 300, "o.partial", "~nosuchuser/o", "a\nb", "é", "\udcff",
    "-", "--", "a b", "a\x1b[31m", "o/", "./o", "o/../o", "'", "*", "[a]", "%s", "{x}", "con", "x.yaml", "/dev/null",
    "/dev/null/x", "/proc/x", "/sys/x",
)  # fmt: skip
SOURCES = (
    "x" * 300, "~nosuchuser/x", "a/b/c", "../nope", "\x1b[31m", "é", "\udcff/x", "a b", "package:", "package:os.path/x",
    "https://user:hf_SECRET@huggingface.co/a/b", "https://huggingface.co/a/b?token=hf_SECRET", "package:../x",
    "package:json/../../x", "/dev/null", "/dev/zero", "/etc/passwd", "x.gguf", "/", ".", "", "x.yaml",
    "x" * 300 + ".yaml", "a\nb/c", "//",
)  # fmt: skip
TEXTS = (
    "[a].txt", "a*.txt", "a b.txt", "é.txt", "x" * 300 + ".txt", "~nosuchuser/x.txt", "/dev/null", "/dev/zero",
    "a\nb.txt", "q?.jsonl", "[x].jsonl", "a::b.jsonl", "{y}.csv",
)  # fmt: skip
VARIABLES = (
    ("HOME", "/nonexistent"), ("HF_HOME", "/dev/null"), ("HF_HOME", "/proc/x"), ("TMPDIR", "/nonexistent"),
    ("COLUMNS", "0"), ("COLUMNS", "abc"), ("COLUMNS", "1"), ("TERM", "dumb"), ("NO_COLOR", "1"), ("LC_ALL", "C"),
)  # fmt: skip
SOURCE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
EXPORT_FILES = ("transmla.json", "config.json", "README.md", "recipe.yaml")


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One command in one environment.

    Attributes:
        kind: kind of the environment, a row of the table.
        name: what is unusual.
        arguments: the command line; the working folder is empty but for what ``arrange`` writes.
        arrange: prepares the working folder, as root.
        enter: changes the forked process before the command.
        silent: whether a refusal cannot be printed.
    """

    kind: str
    name: str
    arguments: tuple[str, ...]
    arrange: Callable[[Path], object] = _nothing
    enter: Callable[[], object] = _nothing
    silent: bool = False


class Commands:
    """Command lines on the folders of ``fuzz_run.build_bases``."""

    def __init__(self, root: Path) -> None:
        self.root, self.text = root, str(root / "text.txt")
        self.llama, self.native = str(root / "llama"), str(root / "native")

    def plan(self, source: str = "s") -> tuple[str, ...]:
        return ("plan", source, "--calibration", self.text, *TEXT)

    def convert(self, source: str = "s", output: str = "o", *, text: str | None = None) -> tuple[str, ...]:
        return ("convert", source, "-o", output, "--reconstruct", "off", "--calibration", text or self.text, *TEXT)

    def eval(self, source: str = "s", *options: str) -> tuple[str, ...]:
        windows = ("--window", "32", "--max-windows", "2", "--device", "cpu")
        return ("eval", source, "--text", self.text, *windows, *options)

    def heal(self, student: str = "s", output: str = "o") -> tuple[str, ...]:
        return ("heal", student, "--teacher", self.llama, "-o", output, "--data", self.text, *HEAL)

    def bench(self, *options: str) -> tuple[str, ...]:
        return ("bench", self.native, "--batch", "1", "--context", "8", "--steps", "1", "--device", "cpu", *options)


def cases(root: Path) -> Iterator[Case]:
    """Yield all cases; those that need root only as root."""
    run = Commands(root)
    if os.geteuid() == 0:
        yield from _permissions(run)
        yield from _disks(run)
    yield from _names(run)
    yield from _special_files(run)
    yield from _streams(run)
    yield from _surroundings(run)


def _copy(base: Path, change: Callable[[Path], object] = _nothing) -> Callable[[Path], None]:
    """Return an arrangement: a copy of ``base`` called ``s``, changed."""

    def arrange(folder: Path) -> None:
        shutil.copytree(base, folder / "s")
        change(folder / "s")

    return arrange


def _closed(base: Path, name: str) -> Callable[[Path], None]:
    """A copy of ``base`` whose files of this name nobody may read."""
    return _copy(base, lambda s: [file.chmod(0) for file in s.glob(name)])


def _below_closed(base: Path) -> Callable[[Path], None]:
    """A copy of ``base`` in a folder ``c`` that nobody may enter."""

    def arrange(folder: Path) -> None:
        shutil.copytree(base, folder / "c" / "s")
        (folder / "c").chmod(0)

    return arrange


def _folder(mode: int) -> Callable[[Path], None]:
    """An empty folder ``c``."""
    return lambda folder: ((folder / "c").mkdir(), (folder / "c").chmod(mode))


def _file(name: str, content: bytes, mode: int = 0o644) -> Callable[[Path], None]:
    return lambda folder: ((folder / name).write_bytes(content), (folder / name).chmod(mode))


def _permissions(run: Commands) -> Iterator[Case]:
    def case(name: str, arguments: tuple[str, ...], arrange: Callable[[Path], object] = _nothing) -> Case:
        return Case("permissions", name, arguments, arrange, become_nobody)

    llama, native, sharded = run.root / "llama", run.root / "native", run.root / "sharded"
    below, locked = _below_closed(llama), _folder(0o555)
    for name in SOURCE_FILES:
        yield case(f"convert, closed {name}", run.convert(), _closed(llama, name))
        yield case(f"eval, closed {name}", run.eval(), _closed(llama, name))
    yield case("closed index", run.plan(), _closed(sharded, "model.safetensors.index.json"))
    yield case("closed shard", run.plan(), _closed(sharded, "model-00002*"))
    yield case("closed source", run.plan(), _copy(llama, lambda s: s.chmod(0)))
    yield case("source that cannot be listed", run.plan(), _copy(llama, lambda s: s.chmod(0o711)))
    yield case("source below a closed folder", run.plan("c/s"), below)
    yield case("eval below a closed folder", run.eval("c/s"), below)
    for place, output, arrange in (
        ("closed", "c/o", below),
        ("root's", "/root/o", _nothing),
        ("locked", "c/o", locked),
    ):
        yield case(f"convert to a {place} folder", run.convert(run.llama, output), arrange)
        yield case(f"heal to a {place} folder", run.heal(run.native, output), arrange)
    yield case("closed text", run.convert(run.llama, text="t.txt"), _file("t.txt", b"a b " * 2000, 0))
    yield case("text below a closed folder", run.convert(run.llama, text="c/t.txt"), below)
    yield case("closed recipe", ("plan", "r.yaml"), _file("r.yaml", b"source: s", 0))
    yield case("recipe below a closed folder", ("plan", "c/r.yaml"), below)
    for name in EXPORT_FILES:
        for arguments in (("verify", "s"), ("push", "s", "a/b", "--dry-run"), run.heal()):
            yield case(f"{arguments[0]}, closed {name}", arguments, _closed(native, name))
    yield case("verify, closed shard", ("verify", "s"), _closed(native, "model-00001*"))
    yield case("verify of another user", ("verify", run.native))
    yield case("verify, closed export", ("verify", "s"), _copy(native, lambda s: s.chmod(0)))
    yield case("report in a locked folder", run.eval(run.llama, "--report", "c/r.html"), locked)
    yield case("plot in a locked folder", run.bench("--plot", "c/p.png"), locked)
    yield case("report in a closed folder", ("inspect", *run.plan(run.llama)[1:], "--report", "c/p.html"), below)
    yield case("locked cache of samples", run.convert(run.llama, text="self"))
    yield case("locked cache of GGUF", run.plan(str(run.root / "gguf" / "model.gguf")))
    yield case("closed GGUF", run.plan("m.gguf"), _file("m.gguf", b"GGUF", 0))
    yield case("locked working folder", run.plan(run.llama), lambda folder: folder.chmod(0o555))


def _mounted(
    size: str, fill: Callable[[Path], object] = _nothing, *, read_only: bool = False
) -> Callable[[Path], None]:
    """Return an arrangement: a disk of this size at ``m``, which the caller unmounts."""

    def arrange(folder: Path) -> None:
        place = folder / "m"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", str(place)], check=True)
        fill(place)
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)

    return arrange


def _disks(run: Commands) -> Iterator[Case]:
    def full(place: Path) -> None:
        """Fill the disk to the last byte."""
        shutil.copytree(run.root / "native", place / "s")
        subprocess.run(["dd", "if=/dev/zero", f"of={place / 'z'}", "bs=1k"], stderr=subprocess.DEVNULL, check=False)

    def export(place: Path) -> None:
        shutil.copytree(run.root / "native", place / "s")

    def case(name: str, arguments: tuple[str, ...], arrange: Callable[[Path], object]) -> Case:
        return Case("disks", name, arguments, arrange)

    for size in ("100k", "300k", "500k"):
        yield case(f"convert, {size}", run.convert(run.llama, "m/o"), _mounted(size))
    for size in ("300k", "800k", "1500k"):
        yield case(f"heal, {size}", run.heal(run.native, "m/o"), _mounted(size))
    yield case("convert, read-only", run.convert(run.llama, "m/o"), _mounted("9m", read_only=True))
    yield case("heal, read-only", run.heal(run.native, "m/o"), _mounted("9m", read_only=True))
    yield case("verify, read-only", ("verify", "m/s"), _mounted("9m", export, read_only=True))
    yield case("push, read-only", ("push", "m/s", "a/b", "--dry-run"), _mounted("9m", export, read_only=True))
    report = run.eval(run.llama, "--report", "m/r.html")
    yield case("report, read-only", report, _mounted("9m", read_only=True))
    yield case("report, full", report, _mounted("8k", lambda place: (place / "x").write_bytes(b"x" * 4000)))
    yield case("verify, full", ("verify", "m/s"), _mounted("1m", full))


def _short(name: str) -> str:
    return repr(name) if len(name) < 80 else f"{name[:3]!r}, {len(name)} characters"


def _names(run: Commands) -> Iterator[Case]:
    for name in OUTPUTS:
        yield Case("names", f"output {_short(name)}", run.convert(run.llama, name))
    for name in SOURCES:
        yield Case("names", f"source {_short(name)}", run.plan(name))
    bodies = {
        ".txt": "a b c d " * 2000,
        ".csv": "text\n" + "a b c d\n" * 3000,
        ".jsonl": (json.dumps({"text": "a b c d " * 9}) + "\n") * 300,
    }
    for name in TEXTS:
        exists = "/" not in name and len(name) < 200
        arrange = _file(name, bodies[Path(name).suffix].encode()) if exists else _nothing
        yield Case("names", f"text {_short(name)}", run.convert(run.llama, text=name), arrange)


def _special_files(run: Commands) -> Iterator[Case]:
    """Folders, pipes, loops and git-lfs pointers where files are expected."""

    def case(name: str, arguments: tuple[str, ...], arrange: Callable[[Path], object] = _nothing) -> Case:
        return Case("special files", name, arguments, arrange)

    def instead(base: str, name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
        return _copy(run.root / base, lambda s: ((s / name).unlink(missing_ok=True), make(s / name)))

    for kind, make in (("folder", Path.mkdir), ("pipe", os.mkfifo)):
        yield case(f"config is a {kind}", run.plan(), instead("llama", "config.json", make))
        yield case(f"manifest is a {kind}", ("verify", "s"), instead("native", "transmla.json", make))
        yield case(f"recipe is a {kind}", ("plan", "r.yaml"), lambda folder, make=make: make(folder / "r.yaml"))
    yield case("tokenizer is a pipe", run.convert(), instead("llama", "tokenizer.json", os.mkfifo))
    yield case("weights are a folder", run.plan(), instead("llama", "model.safetensors", Path.mkdir))
    yield case("source is a loop of links", run.plan("l"), lambda folder: (folder / "l").symlink_to("l"))
    yield case("verify a file", ("verify", run.text))
    yield case("verify nothing", ("verify", "nope"))
    yield case("heal nothing", run.heal("nope"))
    yield case("push a file", ("push", run.text, "a/b"))
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
        for arguments in (run.convert(), run.eval()):
            pointer = instead("llama", name, lambda file: file.write_bytes(POINTER))
            yield case(f"{arguments[0]}, pointer for {name}", arguments, pointer)
    yield case("pointer for a GGUF", run.plan("m.gguf"), _file("m.gguf", POINTER))
    yield case("pointer for a text", run.convert(run.llama, text="t.txt"), _file("t.txt", POINTER))


def _broken_pipe(number: int) -> Callable[[], None]:
    """Make a stream a pipe that nobody reads."""

    def enter() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)

    return enter


def _full(number: int) -> Callable[[], object]:
    return lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def _none(name: str) -> Callable[[], None]:
    """Make a stream None, as in programs without a console."""
    return lambda: setattr(sys, name, None)


def _encoded(encoding: str) -> Callable[[], None]:
    def enter() -> None:
        for number, name in ((1, "stdout"), (2, "stderr")):
            stream = io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), encoding=encoding)
            setattr(sys, name, stream)

    return enter


def _without_working_folder() -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def _streams(run: Commands) -> Iterator[Case]:
    shown = {
        "plan": run.plan(run.llama),
        "plan --json": (*run.plan(run.llama), "--json"),
        "convert": run.convert(run.llama),
        "families": ("families",),
        "--help": ("--help",),
        "convert --help": ("convert", "--help"),
        "verify": ("verify", run.native),
        "eval": run.eval(run.llama),
        "a refusal": ("plan", "nope/x/y"),
    }
    for name, arguments in shown.items():
        for number, stream in ((1, "stdout"), (2, "stderr")):
            for what, enter in (("broken", _broken_pipe(number)), ("full", _full(number)), ("missing", _none(stream))):
                yield Case("streams", f"{name}, {stream} {what}", arguments, enter=enter, silent=number == 2)
        for encoding in ("ascii", "cp1252"):
            yield Case("streams", f"{name}, {encoding}", arguments, enter=_encoded(encoding))
        yield Case("surroundings", f"{name}, no working folder", arguments, enter=_without_working_folder)


def _limited(which: int, number: int) -> Callable[[], None]:
    def enter() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(which, (number, number))

    return enter


def _surroundings(run: Commands) -> Iterator[Case]:
    """Limits, environment variables and a missing working folder."""

    def case(name: str, arguments: tuple[str, ...], enter: Callable[[], object]) -> Case:
        return Case("surroundings", name, arguments, enter=enter)

    yield case("relative source, no working folder", run.plan(), _without_working_folder)
    for size in (5_000, 50_000):
        yield case(f"files of {size} bytes", run.convert(run.llama), _limited(resource.RLIMIT_FSIZE, size))
    yield case("heal, files of 20,000 bytes", run.heal(run.native), _limited(resource.RLIMIT_FSIZE, 20_000))
    for files in (8, 12, 20):
        for arguments in (run.convert(run.llama), run.eval(run.llama)):
            name = f"{arguments[0]}, {files} open files"
            yield case(name, arguments, _limited(resource.RLIMIT_NOFILE, files))
    for variable, value in VARIABLES:
        for arguments in (run.plan(run.llama), run.convert(run.llama), ("plan", "nope/x/y")):
            name = f"{arguments[0]} {arguments[1][-8:]}, {variable}={value}"
            yield case(name, arguments, lambda v=variable, x=value: os.environ.update({v: x}))
