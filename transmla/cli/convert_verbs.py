"""The verbs that read a source: families, plan, inspect and convert."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from transmla.cli.early import load_libraries, refuse_processes, refuse_recipe, refuse_run
from transmla.cli.options import JsonOption, command_line, overrides, with_recipe_options
from transmla.files import json_text
from transmla.recipe import Recipe, parse_recipe, read_recipe

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Checkpoint folder, .gguf file, Hub id, package:NAME/FILE, or a recipe (.yaml).",
    ),
]


def families(
    *,
    markdown: Annotated[bool, typer.Option(help="Print the table of docs/families.md.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the model families that convert, the format that each becomes, and what its attention may have.

    Example: transmla families
    """
    from transmla.cli import console
    from transmla.plan import family_table

    load_libraries()

    if as_json:
        print(json_text([vars(row) for row in family_table.supported()]))
    elif markdown:
        print(family_table.markdown())
    else:
        rows = [[f.family, f.format, ", ".join(f.carried), f.models] for f in family_table.supported()]
        console.table("families", ["model_type", "format", "its attention has", "models"], rows)
        console.say(family_table.notes())


@with_recipe_options("calibration")
def plan(
    source: SourceArgument,
    *,
    processes: Annotated[
        int,
        typer.Option(
            help="Processes that will share the work on one machine, each with a GPU of its own: accelerate's "
            "--num_processes, or torchrun's --nproc_per_node on a CPU."
        ),
    ] = 1,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Show what a conversion would do: shape, cache, contexts, runtimes and cost. Converts nothing.

    Reads headers only: of a Hub id no weights are downloaded, and a .gguf file is not unpacked.

    With --processes 2, the cost is that of a conversion on two GPUs of this machine: the RAM of both processes, the
    memory of each GPU, the time when they share the work, and the command that starts them.

    Example: transmla plan meta-llama/Llama-3.1-8B --cache-ratio 0.25
    """
    refuse_processes(processes)
    recipe = _recipe(source, options | {"output": "unused"})
    load_libraries()
    from transmla.cli import console
    from transmla.convert.prepare import prepare, process_bytes, rates_of, summarise
    from transmla.heal.choose import estimated_seconds
    from transmla.workflow import choice_for, healing_by_way, refusals

    prepared = prepare(recipe, weights=False, processes=processes)
    choice, rates = choice_for(prepared), rates_of(prepared)
    summary = summarise(prepared, rates) | {
        "healing": choice.reason or None,
        "healing_disk_bytes": choice.disk_bytes,
        "healing_seconds": estimated_seconds(choice, prepared.plan, rates, processes),
        "refused": refusals(prepared, choice),
    }
    if processes > 1:
        launcher = ["torchrun", "--nproc_per_node", str(processes)]
        if prepared.device.type == "cuda":
            launcher = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes)]
        summary |= {
            "processes": processes,
            "process_memory_bytes": process_bytes(prepared),
            "healing_by_way": healing_by_way(prepared, choice, rates),
            "launch": shlex.join([*launcher, "-m", "transmla", "convert", source, *command_line(options)]),
        }
    if as_json:
        print(json_text(summary))
    else:
        console.show_plan(prepared.plan, summary)


@with_recipe_options("calibration")
def inspect(
    source: SourceArgument,
    *,
    report: Annotated[Path | None, typer.Option(help="Also draw a report: a .png or .html file.")] = None,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Measure a source before converting it: spectra, rotary energy, and the error at several cache budgets.

    Runs the source over the calibration text, one layer in memory at a time, and writes no weights. The shapes are
    those that `convert` chooses with the same options; the errors are those of the closed form, before any fit.

    Of a big model, --layers 0,1,30 or --layers 0-3 measures these layers only, and the source runs up to the last of
    them. The default calibration text is sampled from the whole model; a text such as --calibration pydoc is not.

    Example: transmla inspect meta-llama/Llama-3.1-8B --report llama.html
    """
    from transmla.evaluate import figures

    recipe = _recipe(source, options | {"output": "unused"})
    if report:
        figures.check_picture(report)
    load_libraries()
    from transmla.cli import console, inspect_report
    from transmla.cli.bars import Bars
    from transmla.convert.inspect import inspect_source

    with Bars() as bars:
        inspection = inspect_source(recipe, bars)
    if as_json:
        print(json_text(inspection.to_dict()))
    else:
        console.show_inspection(inspection)
    if report:
        inspect_report.write_picture(inspection, report)
        console.err.print(f"wrote {report}", highlight=False, markup=False)


@with_recipe_options("calibration", "eval")
def convert(
    source: SourceArgument,
    *,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder to write (default: the recipe's, or the source's name and -mla in the current directory).",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue a conversion that was interrupted.")] = False,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Convert a checkpoint to Multi-head Latent Attention.

    Writes a new folder that transformers loads. On a GPU, minutes of distillation end the conversion (--heal). An
    interrupted run leaves OUTPUT.partial or OUTPUT.unhealed, which --resume continues. With --eval, which may be given
    several times, source and export are compared on these texts at the end. The last table says where the time went.

    The error beside the progress is the relative squared error of the last layer's attention, as in the model card.

    With --cache-ratio auto, give the loss that you accept (--max-kl) instead of a size. The smallest cache that keeps
    to this loss is found by trial conversions, and the loss is measured again on text that chose nothing.

    On several GPUs: accelerate launch --config_file recipes/accelerate/ddp.yaml -m transmla convert SOURCE …

    Example: transmla convert meta-llama/Llama-3.1-8B --output llama-mla --cache-ratio 0.25 --eval wikitext
    """
    from transmla.evaluate.texts import check_texts

    recipe = _recipe(source, options | {"output": output})
    refuse_run(recipe.output, recipe.calibration.source, resume=resume)
    if recipe.eval:
        check_texts(recipe.eval)
    from transmla.cli import console
    from transmla.cli.bars import Bars

    load_libraries()
    from transmla.evaluate.compare import check_evaluation, evaluate_export
    from transmla.export.manifest import Manifest
    from transmla.ranks import describe_launch, launched, leave
    from transmla.reporter import Timed
    from transmla.source.device import pick_device
    from transmla.workflow import convert_and_heal

    ranks = launched(recipe.device)
    pick_device(recipe.device)  # before a text is read
    if line := describe_launch():
        console.note(line)
    ranks.first_then_others(lambda: check_evaluation(recipe))
    if ranks.first and "output" not in recipe.model_fields_set:
        console.note(f"no --output: writing {recipe.output}")
    with Bars() as bars:
        timed = Timed(bars)
        folder = convert_and_heal(recipe, resume=resume, reporter=timed)
        leave()
        if not ranks.first:
            return
        evaluation = evaluate_export(folder, recipe, timed) if recipe.eval else None
        stages = timed.finish()
    manifest = Manifest.read(folder)
    if as_json:
        promise = {} if manifest.promise is None else {"promise": vars(manifest.promise)}
        print(json_text({"output": str(folder), "stages": stages, "evaluation": evaluation, **promise}))
        return
    if manifest.promise:
        console.show_promise(manifest.plan, manifest.promise)
    if evaluation:
        console.show_before_after(manifest.plan, evaluation)
    if not (manifest.promise or evaluation):  # their tables have the cache
        console.show_cache(manifest.plan)
    console.show_times(stages)
    console.say(f"wrote {folder}; next: transmla verify {shlex.quote(str(folder))}")


def _recipe(source: str, options: dict[str, Any]) -> Recipe:
    """Return the recipe of a command: the file ``source``, or the model ``source``, with the flags that were given.

    Raises:
        TransmlaError: if a setting is wrong, or the model is not there.
    """
    given, file = overrides(options), source.endswith((".yaml", ".yml"))
    recipe = read_recipe(Path(source), given) if file else parse_recipe({"source": source, **given}, "command line")
    refuse_recipe(recipe)
    return recipe
