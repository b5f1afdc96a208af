import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniphi.errors import InvalidRequestError
from miniphi.llm import StopMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    text = "".join(map(matcher.push, pieces))
    return (text if matcher.matched else text + matcher.flush()), matcher.matched


def reference(stops: list[str], text: str) -> tuple[str, str | None]:
    """Character by character: the stop string that is completed first, the longer one of two."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_holds_back_what_could_become_a_stop_string() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == "the "
    assert matcher.push("N") == ""
    assert matcher.push("x") == "ENx"
    assert matcher.push("EN") == ""
    assert matcher.flush() == "EN"
    assert matcher.matched is None


def test_nothing_leaves_after_a_match() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("one\n") == "one"
    assert matcher.push("\ntwo") == ""
    assert matcher.matched == "\n\n"
    assert matcher.push("three") == ""
    assert matcher.flush() == ""


def test_the_stop_string_that_ends_first_wins_and_then_the_longer_one() -> None:
    assert run(["abcd", "bc"], ["abcd"]) == ("a", "bc")
    assert run(["bc", "abc"], ["xabc"]) == ("x", "abc")


def test_without_stop_strings_everything_leaves_at_once() -> None:
    assert StopMatcher([]).push("text") == "text"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="stop: found an empty string"):
        StopMatcher(["a", ""])


@given(
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("ab\n", max_size=5), max_size=12),
)
def test_the_division_into_pieces_changes_nothing(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == reference(stops, "".join(pieces))
