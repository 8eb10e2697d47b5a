"""The command line: a table of verbs, each a few lines over the library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from transmla.cli.options import overrides, with_healing_options, with_recipe_options
from transmla.errors import TransmlaError

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Checkpoint folder, .gguf file, Hub id, package:NAME/FILE, or a recipe (.yaml).",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@with_recipe_options
def plan(source: SourceArgument, *, as_json: JsonOption = False, **options: Any) -> None:
    """Show what a conversion would do: shapes, cache, contexts, runtimes, cost. Computes nothing.

    A Hub id is downloaded first, once its config is found convertible.

    Example: transmla plan meta-llama/Llama-3.1-8B --cache-ratio 0.25
    """
    from transmla.cli import console
    from transmla.convert.prepare import prepare, summarise

    prepared = prepare(_recipe(source, options | {"output": options.get("output") or "unused"}))
    result = summarise(prepared)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        console.show_plan(prepared.plan, result)


@with_recipe_options
def inspect(
    source: SourceArgument,
    *,
    report: Annotated[Path | None, typer.Option(help="Also draw a picture: a .png or .html file.")] = None,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Look at a source before converting it: spectra, rotary energy, phases, loss by cache budget.

    Runs the source over the calibration text and writes no weights. Every budget chooses its own widths, so
    options of the shape play no part; errors are those before any reconstruction.

    Example: transmla inspect meta-llama/Llama-3.1-8B --report llama.html
    """
    from transmla.cli import console, inspect_report
    from transmla.convert.inspect import inspect_source
    from transmla.evaluate import figures as picture

    recipe = _recipe(source, options | {"output": "unused"})
    if report:
        picture.check_picture(report)
    with console.Bars() as bars:
        found = inspect_source(recipe, bars)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        console.show_inspection(found)
    if report:
        inspect_report.write_picture(found, report)
        console.err.print(f"wrote {report}", highlight=False, markup=False)


@with_recipe_options
def convert(
    source: SourceArgument,
    *,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write; a recipe may name it.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue a conversion that was interrupted.")] = False,
    **options: Any,
) -> None:
    """Convert a checkpoint to Multi-head Latent Attention.

    Writes a folder that transformers loads: of the native format with no custom code. An interrupted run leaves
    OUTPUT.partial and continues with --resume.

    Example: transmla convert meta-llama/Llama-3.1-8B --output llama-mla --cache-ratio 0.25
    """
    from transmla.cli import console
    from transmla.convert import pipeline
    from transmla.evaluate.compare import evaluate_export
    from transmla.evaluate.perplexity import check_stride
    from transmla.export.manifest import Manifest

    recipe = _recipe(source, options | {"output": output})
    if recipe.eval:
        check_stride(recipe.eval.window, recipe.eval.stride)
    with console.Bars() as bars:
        folder = pipeline.convert(recipe, resume=resume, reporter=bars)
        evaluation = evaluate_export(folder, recipe, bars) if recipe.eval else None
    if evaluation:
        console.show_before_after(Manifest.read(folder).plan, evaluation)
    console.say(f"wrote {folder}; next: transmla verify {folder}")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An export.")],
    *,
    source: Annotated[str | None, typer.Option(help="Compare the untouched weights with this source.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: precision the export is run in.")] = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Check an export: hashes, loading, cache = no cache, absorbed = expanded, cache bytes, norms.

    Exits with 1 if a check fails. A pass is recorded in the folder, and `transmla push` asks for it.
    """
    import torch

    from transmla.cli import console
    from transmla.evaluate.verify import verify as run
    from transmla.formats.model_checks import TOLERANCE
    from transmla.source.device import pick_device

    precision = getattr(torch, dtype, None)
    if precision not in TOLERANCE:
        raise TransmlaError(f"dtype '{dtype}' is not supported", limit="float32 or bfloat16", remedy="choose one")
    failed = 0
    for check in run(folder, source=source, dtype=precision, device=str(pick_device(device))):
        console.show_check(check)
        failed += not check.passed
    if failed:
        console.err.print(f"[red]{failed} check{'s' if failed > 1 else ''} failed[/]")
        raise typer.Exit(1)
    console.say(f"verified; next: transmla push {folder} ORG/NAME")


def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Any causal LM: folder, .gguf file, Hub id or package:NAME/FILE."),
    ],
    *,
    baseline: Annotated[str | None, typer.Option(help="Also measure KL and top-1 agreement to this model.")] = None,
    text: Annotated[str, typer.Option(help="pydoc, a .txt/.jsonl/.parquet file, or a Hub dataset.")] = "pydoc",
    split: Annotated[
        str | None, typer.Option(help="Split of a dataset; of pydoc: train or test (default: test).")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Text column of a dataset.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Windows at most (default: the whole text).")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows (default: window).")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32 or bfloat16.")] = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity by fixed windows, and the distance from a baseline."""
    from transmla.cli import console
    from transmla.evaluate.compare import evaluate_models
    from transmla.recipe import Evaluation, parse_section

    settings = parse_section(
        Evaluation,
        {
            "text": text,
            "split": split,
            "column": column,
            "window": window,
            "max_windows": max_windows,
            "stride": stride,
        },
    )
    with console.Bars() as bars:
        result = evaluate_models(model, baseline, settings, dtype=dtype, device=device, reporter=bars)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        console.show_evaluation(result, text)


def bench(
    model: Annotated[str, typer.Argument(metavar="DIR", help="An export, or any MLA model of transformers.")],
    *,
    baseline: Annotated[str | None, typer.Option(help="Also measure this model, as transformers runs it.")] = None,
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences at once; may be given several times.")] = [1, 8],  # noqa: B006
    context: Annotated[list[int], typer.Option(min=2, help="Tokens in the cache; may be given several times.")] = [  # noqa: B006
        1024,
        4096,
    ],
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded at each point; their median counts.")] = 16,
    backend: Annotated[
        str, typer.Option(help="Decode kernels: auto, torch, triton, hopper, flashmla or flashinfer.")
    ] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Also draw tokens per second into this .png file.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32 or bfloat16.")] = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure decoding speed over caches of given lengths, against a baseline and the device's own copy speed.

    Example: transmla bench llama-mla --baseline meta-llama/Llama-3.1-8B --batch 1 --batch 32 --context 16384
    """
    from transmla.cli import console
    from transmla.evaluate import figures as picture
    from transmla.evaluate.compare import bench_models

    if plot:
        picture.check_picture(plot, (".png",))
    with console.Bars() as bars:
        found = bench_models(
            model,
            baseline,
            batches=batch,
            contexts=context,
            steps=steps,
            backend=backend,
            dtype=dtype,
            device=device,
            reporter=bars,
        )
    if as_json:
        print(json.dumps({role: result.to_dict() for role, result in found.items()}, indent=2))
    else:
        console.show_bench(found)
    if plot:
        picture.write_speeds(found, plot)
        console.err.print(f"wrote {plot}", highlight=False, markup=False)


@with_healing_options
def heal(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="An export.")],
    *,
    teacher: Annotated[str, typer.Option(help="The source, or a larger model with the same tokenizer.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a teacher on the Hub.")] = None,
    data: Annotated[
        list[str],
        typer.Option(
            help="self (sampled from the teacher), pydoc, a .txt/.jsonl/.parquet file, or a Hub dataset; given several"
            " times, they are taken in equal shares."
        ),
    ] = ["self"],  # noqa: B006
    resume: Annotated[bool, typer.Option(help="Continue a healing that was interrupted.")] = False,
    track: Annotated[
        list[str] | None, typer.Option(help="Experiment tracker of accelerate: tensorboard, wandb, …")
    ] = None,
    **options: Any,
) -> None:
    """Win back what compression lost: a short distillation from the source.

    The result is again an export, verified on writing. On several GPUs, by DDP, FSDP2 or DeepSpeed:
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m transmla.heal DIR --teacher …

    Example: transmla heal llama-mla --teacher meta-llama/Llama-3.1-8B -o llama-mla-healed --data wikitext
    --data self
    """
    from accelerate import PartialState

    from transmla.cli import console
    from transmla.export.manifest import Manifest
    from transmla.heal.run import heal as run
    from transmla.heal.settings import Healing
    from transmla.recipe import parse_section

    given = {name: value for name, value in options.items() if value is not None}
    named = {"student": folder, "teacher": teacher, "output": output, "revision": revision}
    settings = parse_section(Healing, named | {"data": tuple(data), "track": tuple(track or ())} | given)
    with console.Bars() as bars:
        healed = run(settings, resume=resume, reporter=bars)
    if not PartialState().is_main_process:
        return
    console.show_healing(Manifest.read(healed).healing[-1])
    console.say(f"wrote {healed}; next: transmla eval {healed} --baseline {teacher}")


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
    """Upload a verified export to the Hugging Face Hub, in one commit."""
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


def families(
    *,
    markdown: Annotated[bool, typer.Option(help="Print the table as the README holds it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the model families that convert, the format each becomes, and what of it is carried.

    Example: transmla families
    """
    from transmla.cli import console
    from transmla.plan import family_table as support

    if as_json:
        print(json.dumps([vars(found) for found in support.supported()], indent=2))
    elif markdown:
        print(support.markdown())
    else:
        rows = [[f.family, f.format, ", ".join(f.carried), f.models] for f in support.supported()]
        console.table("families", ["model_type", "format", "its attention has", "models"], rows)
        console.say(support.notes())


def _recipe(source: str, options: dict[str, Any]) -> Any:
    from transmla.recipe import parse_recipe, read_recipe

    given = overrides(options)
    if source.endswith((".yaml", ".yml")):
        return read_recipe(Path(source), given)
    return parse_recipe({"source": source, **given}, "command line")


VERBS: dict[str, Callable[..., None]] = {
    "families": families,
    "plan": plan,
    "inspect": inspect,
    "convert": convert,
    "verify": verify,
    "eval": evaluate,
    "heal": heal,
    "bench": bench,
    "push": push,
}
