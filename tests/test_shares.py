"""Shares of texts: what entries say, what is left, and what is refused."""

import pytest

from transmla.shares import name_and_weight, percentages, shares


def test_entries_with_and_without_weights() -> None:
    assert name_and_weight("wikitext") == ("wikitext", None)
    assert name_and_weight("self:0.25") == ("self", 0.25)
    assert name_and_weight("org/name:config") == ("org/name:config", None)
    assert name_and_weight("org/name:config:0.5") == ("org/name:config", 0.5)
    assert name_and_weight("C:\\texts\\a.txt") == ("C:\\texts\\a.txt", None)


def test_shares_sum_to_one() -> None:
    assert shares(["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert shares(["a", "b", "self:0.5"]) == {"a": 0.25, "b": 0.25, "self": 0.5}
    thirds = shares(["a:0.33", "b:0.33", "c:0.34"])
    assert sum(thirds.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("parts", "written"),
    [
        ((0.6, 0.175, 0.175, 0.05), ("60%", "18%", "17%", "5%")),
        ((0.625, 0.125, 0.125, 0.125), ("63%", "13%", "12%", "12%")),
        ((1 / 3, 1 / 3, 1 / 3), ("34%", "33%", "33%")),
        ((1.0,), ("100%",)),
        ((0.29, 0.58, 0.13), ("29%", "58%", "13%")),
    ],
)
def test_percentages_sum_to_100(parts: tuple[float, ...], written: tuple[str, ...]) -> None:
    found = tuple(percentages(dict(enumerate(parts))).values())  # type: ignore[arg-type]
    assert sum(int(share[:-1]) for share in found) == 100
    assert sorted(found) == sorted(written)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (["a:0.5", "b:0.4"], "sum to 0.9"),
        (["a:1", "b"], "leave nothing"),
        (["a:0", "b"], "must be above 0"),
        (["a:-1", "b"], "must be above 0"),
        (["a:nan", "b"], "must be above 0"),
        (["a", "a:0.5"], "given twice"),
    ],
)
def test_impossible_weights_are_refused(entries: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        shares(entries)
