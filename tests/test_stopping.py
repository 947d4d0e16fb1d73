"""Stop texts that come in pieces."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_core.text.stopping import StopTexts


def streamed(pieces, stops):
    watch = StopTexts(stops)
    shown = ""
    for piece in pieces:
        shown += watch.push(piece)
        if watch.found:
            return shown, True
    return shown + watch.finish(), False


@given(st.lists(st.text("abc", max_size=3), max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_pieces_give_what_the_whole_text_would(pieces, stops):
    """Nothing of a stop text is shown, everything before the first is; how the text is cut does not
    matter.
    """
    # the end of the first piece with which a stop text is whole: what comes later is not looked at
    for n in range(len(pieces) + 1):
        text = "".join(pieces[:n])
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            assert streamed(pieces, stops) == (text[: min(places)], True)
            return
    assert streamed(pieces, stops) == ("".join(pieces), False)


def test_what_is_certain_is_given_at_once():
    watch = StopTexts(["</end>"])
    assert watch.push("words <") == "words "
    assert watch.push("b> more") == "<b> more"
    assert (watch.push("</en"), watch.push("d> after")) == ("", "")
    assert watch.found
    assert watch.push("later") == ""


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="an empty text would end every generation at once"):
        StopTexts(["x", ""])


def test_overlapping_beginnings():
    for cut in itertools.product((1, 2, 3), repeat=2):
        text, pieces = "aabaabaac", []
        for n in cut:
            pieces.append(text[:n])
            text = text[n:]
        assert streamed([*pieces, text], ["aabaac"]) == ("aab", True)
