"""Stop strings against their definition: the text, character by character."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenport.engines import GenerationError, StopStrings


def expected(text: str, strings: list[str]) -> tuple[str, int | None]:
    """What is left of a text, by looking for every string at every end."""
    for end in range(1, len(text) + 1):
        ends = [i for i, string in enumerate(strings) if text[:end].endswith(string)]
        if ends:
            found = min(ends, key=lambda i: (-len(strings[i]), i))
            return text[: end - len(strings[found])], found
    return text, None


letters = st.text("ab é", max_size=6)


@settings(max_examples=500)
@given(st.lists(letters, max_size=8), st.lists(st.text("ab é", min_size=1, max_size=5), max_size=4))
@example(["ab", "c"], ["abc", "b"])
@example(["a", "a", "b"], ["aab"])
@example(["abab", "x"], ["ababc"])
def test_any_split_of_a_text_ends_where_the_text_ends(
    pieces: list[str], strings: list[str]
) -> None:
    stops = StopStrings(strings)
    so_far, given_ = "", ""
    for piece in pieces:
        given_ += piece
        so_far += stops.push(piece)
        text, found = expected(given_, strings)
        assert stops.found == found
        if found is not None:
            assert so_far == text and stops.flush() == "" and stops.push("x") == ""
            return
        longest = max(
            (
                n
                for n in range(1, len(given_) + 1)
                if any(s.startswith(given_[-n:]) for s in strings)
            ),
            default=0,
        )
        assert (
            so_far == given_[: len(given_) - longest]
        )  # no more is held back than may be a beginning
    assert so_far + stops.flush() == given_


@pytest.mark.parametrize("strings", ["ab", [""], [1], 5, [b"a"], {"a"}])
def test_what_is_no_list_of_texts_is_refused(strings: object) -> None:
    with pytest.raises(GenerationError, match="stop string"):
        StopStrings(strings)  # type: ignore[arg-type]
