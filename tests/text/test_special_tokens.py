"""Which tokens the embedded tokenizer marks as special: those that the release's does."""

import dsv4_core as dsv4

SHOWN = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜")
HIDDEN = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")


def test_special_as_published():
    """The release marks neither roles, nor thinking, nor DSML: a library that skips special tokens
    shows them.
    """
    with dsv4.load(backend="reference", lazy=True) as session:
        tokenizer = session.tokenizer
        for text in (*SHOWN, *HIDDEN):
            (token,) = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode([token], skip_special_tokens=True) == (text if text in SHOWN else "")
