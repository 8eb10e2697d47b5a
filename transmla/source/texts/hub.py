"""Read datasets from the Hugging Face Hub, streamed: only what is needed is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transmla.source.texts.rows import read_errors, row_texts

NO_NETWORK = "leave it out, or take a local .txt, .jsonl or .parquet file, or `pydoc`, which needs no network"
# Seconds to wait for the Hub's answer before it counts as unreachable.
PATIENCE = 5.0
# Number of times that the Hub is asked before a text that the user named counts as unreachable.
TRIES = 2


@dataclass(frozen=True)
class HubText:
    """A dataset with a short name.

    Attributes:
        path: ORG/NAME on the Hub.
        config: configuration of the dataset.
        split: split that is read if none is named.
        column: column that is read if none is named; None chooses it by the rows.
        revision: commit of the dataset; None reads the newest.
    """

    path: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    revision: str | None = None


WIKITEXT = "b08601e04326c79dfdd32d625aee71d232d685c3"
WIKIPEDIA = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"
ALIASES = {
    "wikitext": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", revision=WIKITEXT),
    "c4": HubText("allenai/c4", "en"),
    "ultrachat": HubText(
        "HuggingFaceH4/ultrachat_200k",
        split="train_sft",
        column="messages",
        revision="8049631c405ae6576f93f445c6b8166f76f5505a",
    ),
    "magicoder": HubText(
        "ise-uiuc/Magicoder-OSS-Instruct-75K", column="solution", revision="5f839b1f368a76b161028bb9edff055db34022b2"
    ),
    # The validation split is 50 books, 17 MB.
    "pg19": HubText("emozilla/pg19", split="validation", revision="c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"),
    **{
        f"wikipedia-{language}": HubText("wikimedia/wikipedia", f"20231101.{language}", revision=WIKIPEDIA)
        for language in ("en", "de", "es", "fr", "ru", "zh")
    },
}


def hub_is_reachable() -> bool:
    """Return whether datasets can be read from the Hub: the Hub answers, without retries, and nothing is offline."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    status = _hub_status()
    if status is None or status >= 400:  # the answer of a proxy that blocks the Hub
        return False
    from datasets import config

    return not config.HF_HUB_OFFLINE  # HF_DATASETS_OFFLINE sets only this one


def _hub_status() -> int | None:
    """Return the HTTP status with which the Hub answers; None if it does not answer."""
    from huggingface_hub import constants, get_session

    try:
        return int(get_session().head(constants.ENDPOINT, timeout=PATIENCE).status_code)
    # The errors of HTTP clients (httpx or httpx2, by version) share no narrower class.
    except Exception:
        return None


@contextmanager
def _without_retries() -> Iterator[None]:
    """Let libraries work offline in the block if the Hub does not answer; they would retry for half a minute.

    Offline, `datasets` still reads what is in its cache.
    """
    import huggingface_hub.constants
    from datasets import config

    before = huggingface_hub.constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not any(before) and all(_hub_status() is None for _ in range(TRIES)):
        huggingface_hub.constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def hub_pieces(source: str, split: str | None, column: str | None, tokenizer: Any) -> Iterator[str]:
    """Yield the rows of a dataset, with a blank line between them.

    Args:
        source: alias, dataset id, or "id:config".
        split: split of the dataset; None is the alias's, or "train".
        column: column of texts or chats; None chooses it.
        tokenizer: renders chats.
    """
    from datasets import load_dataset

    path, _, config = source.partition(":")
    text = ALIASES.get(path, HubText(path))
    with read_errors(source, remedy=NO_NETWORK):
        with _without_retries():
            chosen = split or text.split
            rows = load_dataset(text.path, config or text.config, split=chosen, revision=text.revision, streaming=True)
        yield from row_texts(rows, column or text.column, source, tokenizer)
