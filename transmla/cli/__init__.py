"""The command line, ``transmla VERB``.

app            the application: one command per verb, errors as one line
convert_verbs  families, plan, inspect, convert
export_verbs   verify, bench, heal, push
evaluate_verb  eval
serve_verbs    chat, serve
gguf_verb      gguf
early          refusals before torch is imported
options        flags made from the fields of recipes, evaluations and healings
streams        standard output and error: nothing they do ends a command
console        lines and tables
bars           progress of long work, as bars or as a line a minute
report         pages of tables and figures: one HTML file made of sections
bench_report   the tables of ``transmla bench``
eval_report    the report of ``transmla eval``
score_report   its sections on tasks and retrieval
inspect_report the report of ``transmla inspect`` as a picture or a page
"""

from transmla.cli.app import VERBS, main

__all__ = ["VERBS", "main"]
