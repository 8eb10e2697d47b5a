"""Lines and tables of the command line."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transmla.cli.streams import Tolerant
from transmla.errors import printable
from transmla.export.evaluation_table import caption, table_columns, table_rows, text_label

# Importing these modules imports torch, which takes seconds.
if TYPE_CHECKING:
    from transmla.artifacts import Plan
    from transmla.convert.inspect import Inspection
    from transmla.evaluate.retrieval import Retrieval
    from transmla.evaluate.tasks import TaskScores
    from transmla.evaluate.verify import Check
    from transmla.export.manifest import Promise

out = Console(emoji=False)
err = Console(file=cast(IO[str], Tolerant()), emoji=False)
# KL on other text from which on a promise counts as missed, as a multiple of what was promised.
MISSED = 1.1
# Fewest predicted tokens of a text and fewest prompts of a row on which a result rests without a note. At 1,000 tokens,
# the standard error of a perplexity is about a tenth of it; at 20 prompts, that of a rate of a half is 0.11.
FEWEST_TOKENS, FEWEST_PROMPTS = 1000, 20
# Columns of the table of an inspection's budgets, in the terminal and in the report.
BUDGET_COLUMNS = ["cache", "kv_lora_rank", "qk_rope_head_dim", "error"]


def say(text: str) -> None:
    """Print one line of plain text on standard output; brackets are not markup."""
    out.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def plain_line(text: str) -> None:
    """Print one line of plain text on standard error."""
    err.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Print one line on standard error that is no error."""
    err.print(f"[yellow]note:[/] {escape(printable(text))}", highlight=False, soft_wrap=True)


def table(title: str, columns: list[str], rows: list[list[str]], *, wrap: bool = True) -> None:
    """Print a small table; the first column is text, the others are right-aligned.

    ``wrap``: whether a narrow screen may wrap all columns, or only the first.
    """
    drawn = Table(title=escape(printable(title)), title_justify="left")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0 and not wrap, overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(printable(cell)) for cell in row))
    out.print(drawn)


def gigabytes(size: float) -> str:
    """Format ``size`` bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Format a time in ``seconds``."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def show_plan(plan: Plan, summary: dict[str, Any]) -> None:
    """Print the tables of ``transmla plan``: the shape, who runs it, and what the conversion needs."""
    from transmla.export.card import cache_rows

    shape, spec = plan.shape, plan.spec
    (_, *values), (_, *size) = cache_rows(plan)
    table(
        f"{spec.family}, {spec.num_hidden_layers} layers → {summary['target']} ({plan.dtype}, {plan.method})",
        ["", "source", "MLA, at most" if summary.get("choosing_seconds") else "MLA"],
        [
            [
                "attention",
                f"{spec.num_attention_heads} q / {spec.num_key_value_heads} kv × {spec.head_dim}",
                f"latent {shape.kv_lora_rank} + rotary {shape.qk_rope_head_dim}",
            ],
            [
                "head widths (nope, rope, v)",
                f"{spec.head_dim}",
                f"{shape.qk_nope_head_dim}, {shape.qk_rope_head_dim}, {shape.v_head_dim}",
            ],
            ["cache values, converted layers" if plan.kept else "cache values per token, layer", *values],
            ["cache bytes per token", *size],
            *[
                [f"tokens on a {gb} GB GPU", f"{held['before']:,}", f"{held['after']:,}"]
                for gb, held in summary["contexts"].items()
            ],
        ],
    )
    table(
        "who runs it",
        ["runtime", "takes it", "how"],
        [[r["name"], _takes(r), r["note"]] for r in summary["runtimes"]],
    )
    together = f" for {summary['processes']} processes" if "processes" in summary else ""
    say(
        f"conversion: about {gigabytes(summary['memory_bytes'])} RAM{together}, {duration(summary['seconds'])} on"
        f" {summary['device']} (reconstruction {summary['reconstruct']}; texts, samples and healing not counted)"
    )
    if summary.get("choosing_seconds"):
        say(
            f"choosing the cache: at most about {duration(summary['choosing_seconds'])} more, for one pass that"
            " measures what each size costs, and up to three trial conversions"
        )
    healed = summary.get("healing_disk_bytes") or 0
    also = f"; {gigabytes(healed)} while it is healed, with the unhealed copy and the state of the training"
    say(
        f"disk: {gigabytes(summary['export_bytes'])} for the export; {gigabytes(summary['disk_bytes'])} while it is"
        f" converted, with the state for --resume{also if healed else ''}"
    )
    if summary.get("unsampled"):
        say(f"calibration: no samples of the source; {summary['unsampled']}")
    if summary.get("healing"):
        took = summary.get("healing_seconds")
        say(summary["healing"] + (f": about {duration(took)}" if took else ""))
    if "processes" in summary:
        _show_processes(summary)
    for refusal in summary.get("refused", ()):
        out.print(f"[red]convert refuses this here:[/] {escape(printable(refusal))}", highlight=False)
    for note in plan.notes:
        out.print(f"[yellow]note:[/] {escape(printable(note))}", highlight=False)


def _show_processes(summary: dict[str, Any]) -> None:
    """Print what each of several processes needs, and the command that starts them."""
    count, on_gpus = summary["processes"], summary["device"] != "cpu"
    ways = {"ddp": "healing, whole student on each", "fsdp2": "healing, student divided (fsdp2.yaml)"}
    parts = {"conversion": (summary["process_memory_bytes"], summary["seconds"])}
    parts |= {ways[way]: (each["memory_bytes"], each["seconds"]) for way, each in summary["healing_by_way"].items()}
    table(
        f"each of {count} {'GPUs' if on_gpus else 'processes'}",
        ["", "memory", "time"],
        [[name, gigabytes(size), "–" if took is None else duration(took)] for name, (size, took) in parts.items()],
    )
    say(f"start: {summary['launch']}")
    if not on_gpus:
        say("processes on a CPU share its cores: the time is that of one process")


def _takes(runtime: dict[str, Any]) -> str:
    """Return whether a runtime takes an export, in a few words."""
    if not runtime["accepts"]:
        return "no"
    return f"with {runtime['flag']}" if runtime["flag"] else "yes"


def show_inspection(inspection: Inspection) -> None:
    """Print the tables of ``transmla inspect``: every layer, and the mean error by budget."""
    budgets = list(inspection.plans)
    rows = []
    for i, layer in inspection.layers.items():
        spectrum = layer.spectrum
        rows.append(
            [
                str(i),
                str(spectrum.rank_for(0.9)),
                str(spectrum.rank_for(0.99)),
                f"{float((spectrum.rotary * spectrum.one_head).sum()):.0%}",
                f"{float((spectrum.rotary * spectrum.shared).sum()):.0%}",
                f"{float((spectrum.rotary * spectrum.constant).sum()):.0%}",
                *(f"{layer.errors[budget]:.3f}" for budget in budgets),
            ]
        )
    shares = [f"{inspection.plans[budget].cache_ratio:.1%}" for budget in budgets]
    table(
        f"{inspection.source}: what a layer holds, and the closed form's error by share of the cache",
        ["layer", "r90", "r99", "one head", "shared", "const", *shares],
        rows,
    )
    say(
        "r90, r99: latent width that holds 90 or 99 % of the energy of keys and values without position. one head,"
        " shared: rotary energy held by one channel per frequency, taken from the best"
        " head or mixed from all. const: rotary"
        " energy held by a constant. Under each share of the cache: relative squared error of the attention's output"
    )
    some = len(inspection.layers) < inspection.count
    table(
        "mean error by budget" + (f", {len(inspection.layers)} of {inspection.count} layers" if some else ""),
        BUDGET_COLUMNS,
        budget_rows(inspection),
    )


def budget_rows(inspection: Inspection) -> list[list[str]]:
    """Return the rows of the table with ``BUDGET_COLUMNS``: the mean error over the measured layers by budget."""
    return [
        [
            f"{plan.cache_ratio:.1%}",
            str(plan.shape.kv_lora_rank),
            str(plan.shape.qk_rope_head_dim),
            f"{inspection.mean_error(budget):.4f}",
        ]
        for budget, plan in inspection.plans.items()
    ]


def show_check(check: Check) -> None:
    """Print the answer of one check."""
    mark = "[green]pass[/]" if check.passed else "[red]FAIL[/]"
    out.print(f"{mark}  {escape(printable(f'{check.name}: {check.detail}'))}", highlight=False, soft_wrap=True)


def show_evaluation(result: dict[str, Any]) -> None:
    """Print the table of an evaluation: one row per text, and their mean."""
    compared = "" if result["baseline"] is None else f" compared with {result['baseline']}"
    table(f"{result['model']}{compared}", table_columns(result), table_rows(result), wrap=False)
    say(f"{caption(result)} {duration(result['seconds'])} on {result['device']}.")
    for text in result["texts"]:
        if text["tokens"] < FEWEST_TOKENS:
            few = f"{text['tokens']:,} predicted token{'' if text['tokens'] == 1 else 's'}"
            note(f"the numbers of {text_label(text)} rest on {few}; take a text that gives {FEWEST_TOKENS:,} or more")


def show_tasks(result: TaskScores) -> None:
    """Print the score of every task and metric, with standard errors."""
    from transmla.evaluate.score_table import TASK_COLUMNS, task_rows

    table(f"lm-evaluation-harness {result.harness}", TASK_COLUMNS, task_rows(result))


def show_retrieval(result: Retrieval) -> None:
    """Print the share of found keys by kind and length, with standard errors."""
    from transmla.evaluate.score_table import RETRIEVAL_COLUMNS, retrieval_rows

    table("share of pass keys found, over all depths", RETRIEVAL_COLUMNS, retrieval_rows(result))
    prompts = len(result.depths) * result.samples
    if prompts < FEWEST_PROMPTS:
        few = f"{prompts} prompt{'' if prompts == 1 else 's'}"
        note(f"each rate rests on {few}, which its standard error does not show; raise --retrieval-samples")


def show_healing(record: dict[str, Any]) -> None:
    """Print the table that closes a healing."""
    kl, data = record["held_out_kl"], ", ".join(record["settings"]["data"])
    table(
        f"healed on {data}, {record['tokens']:,} tokens in {duration(record['seconds'])}",
        ["", "before", "after"],
        [["held-out KL to the teacher", f"{kl['before']:.4f}", f"{kl['after']:.4f}"]],
    )


def show_times(stages: list[dict[str, Any]]) -> None:
    """Print where the time of a command went: its stages, and the phases of those that tell them."""
    rows, total = [], sum(stage["seconds"] for stage in stages)
    for stage in stages:
        rows.append([stage["name"], f"{stage['seconds']:.1f}", f"{stage['seconds'] / max(total, 1e-9):.0%}"])
        rows += [[f"  {name}", f"{seconds:.1f}", ""] for name, seconds in stage["phases"].items()]
    table(f"{duration(total)} in all", ["stage", "seconds", ""], rows)


def show_cache(plan: Plan) -> None:
    """Print in one line what an export caches, and its share of the source's cache."""
    from transmla.export.card import by_layer

    widths = f"{by_layer(plan, 'kv_lora_rank')} + {by_layer(plan, 'qk_rope_head_dim')}"
    layer = "converted layer" if plan.kept else "layer"
    say(f"cache: {widths} values per token and {layer}, {plan.model_cache_ratio:.1%} of the source's")


def show_promise(plan: Plan, promise: Promise) -> None:
    """Print the table that closes a conversion whose cache was chosen by the loss that is accepted."""
    from transmla.export.card import cache_rows

    table(
        f"the smallest cache for a KL of {promise.accepted:g}: {plan.model_cache_ratio:.1%} of the source's",
        ["", "source", "MLA"],
        [
            *map(list, cache_rows(plan)),
            ["KL promised, nats per token, before healing", "–", f"{promise.accepted:.4f}"],
            ["KL on the text that chose the cache", "–", f"{promise.expected:.4f}"],
            ["KL measured on other text", "–", f"{promise.measured:.4f}"],
        ],
    )
    if promise.measured > MISSED * promise.accepted:
        closer = promise.accepted**2 / promise.measured
        note(
            f"the promise is missed by {promise.measured / promise.accepted - 1:.0%} on other text; a healing lowers"
            f" the KL, and so does a larger cache: --max-kl {closer:.2g}"
        )


def show_before_after(plan: Plan, evaluation: dict[str, Any]) -> None:
    """Print the tables that close a conversion whose recipe has an ``eval`` section."""
    from transmla.export.card import cache_rows

    table("before and after", ["", "source", "MLA"], [*map(list, cache_rows(plan))])
    show_evaluation(evaluation)
