"""The verbs that read an export: verify, bench, heal and push."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from transmla.boundary import local_path
from transmla.cli.early import (
    load_libraries,
    refuse_backend,
    refuse_dtype,
    refuse_models,
    refuse_run,
    refuse_unfinished,
)
from transmla.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    PickleOption,
    given_options,
    help_of,
    with_healing_options,
)
from transmla.export.hashes import UNFINISHED_SUFFIX
from transmla.export.output import output_path
from transmla.files import json_text
from transmla.heal.settings import Healing
from transmla.recipe import parse_section
from transmla.source.locate import refuse_revision


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An export.")],
    *,
    source: Annotated[
        str | None, typer.Option(help="Also compare with this source: weights, config, files, and each layer.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision to run the export in: float32 or bfloat16.")] = "float32",
    device: DeviceOption = "auto",
    allow_pickle: PickleOption = False,
) -> None:
    """Check an export: file hashes, what each layer computes, loading, cached against full forward passes, and more.

    Differences are relative, and stand beside the largest that is allowed. What the conversion costs in quality is
    measured by `transmla eval`. Exits with 1 if a check fails. A pass is recorded in the folder, and `transmla push`
    asks for it.

    Example: transmla verify llama-mla --source meta-llama/Llama-3.1-8B
    """
    refuse_dtype(dtype, ("float32", "bfloat16"))
    refuse_unfinished(folder)
    refuse_models(source)
    load_libraries()
    import torch

    from transmla.cli import console
    from transmla.evaluate.record import RECORD
    from transmla.evaluate.verify import verify as run
    from transmla.source.device import pick_device

    precision = getattr(torch, dtype)
    failed, recorded = 0, True
    chosen = str(pick_device(device))
    for check in run(folder, source=source, dtype=precision, device=chosen, allow_pickle=allow_pickle):
        console.show_check(check)
        failed += not check.passed
        recorded &= check.name != RECORD
    if failed:
        console.err.print(f"[red]{failed} check{'s' if failed > 1 else ''} failed[/]")
        raise typer.Exit(1)
    command = f"transmla push {shlex.quote(str(folder))} ORG/NAME"
    console.say(f"verified; next: {command}" if recorded else "verified, not recorded")


def bench(
    model: Annotated[str, typer.Argument(metavar="DIR", help="An export, or any MLA model of transformers.")],
    *,
    baseline: Annotated[str | None, typer.Option(help="Also measure this model, as transformers runs it.")] = None,
    batch: Annotated[
        list[int], typer.Option(min=1, help="Sequences at once; give it several times for several batches.")
    ] = [1, 8],  # noqa: B006
    context: Annotated[
        list[int], typer.Option(min=2, help="Tokens in the cache; give it several times for several contexts.")
    ] = [  # noqa: B006
        1024,
        4096,
    ],
    new_tokens: Annotated[
        list[int], typer.Option(min=1, help="Tokens that a step decodes, as when drafts are verified; several times.")
    ] = [1],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Steps to decode at each point; the median time counts.")] = 16,
    backend: Annotated[
        str, typer.Option(help="Decode kernels: auto, torch, triton, hopper, flashmla or flashinfer.")
    ] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Also draw tokens per second into this .png file.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    allow_pickle: PickleOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure decoding speed by batch and context, against a baseline and the device's own copy speed.

    On a GPU, each point is measured as plain generate() decodes, and compiled with a static cache.

    Example: transmla bench llama-mla --baseline meta-llama/Llama-3.1-8B --batch 1 --batch 32 --context 16384
    """
    from transmla.evaluate import figures

    refuse_dtype(dtype)
    refuse_backend(backend)
    refuse_models(model, baseline)
    if plot:
        figures.check_picture(plot, (".png",))
    load_libraries()
    from transmla.cli import console
    from transmla.cli.bars import Bars
    from transmla.cli.bench_report import show_bench
    from transmla.evaluate.compare import bench_models

    with Bars() as bars:
        results = bench_models(
            model,
            baseline,
            batches=batch,
            contexts=context,
            new_tokens=new_tokens,
            steps=steps,
            backend=backend,
            dtype=dtype,
            device=device,
            allow_pickle=allow_pickle,
            reporter=bars,
        )
    if as_json:
        print(json_text({role: result.to_dict() for role, result in results.items()}))
    else:
        show_bench(results)
    if plot:
        figures.write_speeds(results, plot)
        console.err.print(f"wrote {plot}", highlight=False, markup=False)


@with_healing_options
def heal(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="An export.")],
    *,
    teacher: Annotated[str, typer.Option(help="The source, or a larger model with the same tokenizer.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write.")],
    revision: Annotated[str | None, typer.Option(help=help_of(Healing, "revision"))] = None,
    data: Annotated[list[str], typer.Option(help=help_of(Healing, "data"))] = ["auto"],  # noqa: B006
    allow_pickle: PickleOption = False,
    resume: Annotated[bool, typer.Option(help="Continue a healing that was interrupted.")] = False,
    track: Annotated[list[str] | None, typer.Option(help=help_of(Healing, "track"))] = None,
    **options: Any,
) -> None:
    """Distil an export from its source for some minutes, to win back what compression lost.

    The result is again an export, verified on writing. On several GPUs, by DDP, FSDP2 or DeepSpeed:
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m transmla heal DIR --teacher …

    Example: transmla heal llama-mla --teacher meta-llama/Llama-3.1-8B -o llama-mla-healed --data wikitext
    --data self
    """
    given = given_options(options)
    named = {"student": folder, "teacher": teacher, "output": output, "revision": revision}
    given["allow_pickle"] = allow_pickle
    settings = parse_section(Healing, named | {"data": tuple(data), "track": tuple(track or ())} | given)
    refuse_unfinished(local_path(folder))
    refuse_models(teacher)
    refuse_revision(teacher, revision)
    refuse_run(output, settings.data, resume=resume)
    load_libraries()
    from accelerate import PartialState

    from transmla.cli import console
    from transmla.cli.bars import Bars
    from transmla.export.manifest import Manifest
    from transmla.heal.run import heal as run
    from transmla.ranks import describe_launch, starts_first

    target = output_path(output)
    partial = target.with_name(target.name + UNFINISHED_SUFFIX)
    if resume and starts_first() and not (partial.exists() or target.exists()):
        console.note(f"nothing to resume in '{partial}': starting anew")
    if line := describe_launch():
        console.note(line)
    with Bars() as bars:
        healed = run(settings, resume=resume, reporter=bars)
    if not PartialState().is_main_process:
        return
    console.show_healing(Manifest.read(healed).healing[-1])
    command = f"transmla eval {shlex.quote(str(healed))} --baseline {shlex.quote(teacher)}"
    console.say(f"wrote {healed}; next: {command}")


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A verified export.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="ORG/NAME on the Hub.")],
    *,
    private: Annotated[bool, typer.Option(help="Create the repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if missing.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    token: Annotated[str | None, typer.Option(help="Access token (default: the one you are logged in with).")] = None,
    dry_run: Annotated[bool, typer.Option(help="List files and sizes, send nothing.")] = False,
) -> None:
    """Upload a verified export to the Hugging Face Hub, in one commit.

    Example: transmla push llama-mla you/llama-mla --dry-run
    """
    refuse_unfinished(folder)
    load_libraries()
    from transmla.cli import console
    from transmla.export import push as hub

    result = hub.push(
        folder,
        repo_id,
        private=private,
        revision=revision,
        commit_message=message,
        token=token,
        dry_run=dry_run,
    )
    rows = [[file.path, f"{file.size:,}"] for file in result.files]
    console.table(f"{'would push' if dry_run else 'pushed'} to {result.repo_id}", ["file", "bytes"], rows)
    console.say(result.url)
