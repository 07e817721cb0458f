"""Quoted text, one character at a time: how the released models learned to draw letters.

An instruction such as `change the sign to "OPEN"` is tokenised normally outside the quotes and
letter by letter inside them, so that every letter to be drawn has a feature of its own. Called by
`InstructionTokenizer`; plain functions over a tokenizer, no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_OPENING, _CLOSING = "“", "”"


class Piece(NamedTuple):
    """A stretch of text that is tokenised alone; `quoted` marks one character of quoted text."""

    text: str
    quoted: bool


def split_quoted(text: str, *, offset: int, apostrophe_quotes: bool) -> list[Piece]:
    """Cut a rendered chat text into stretches outside quotes and single quoted characters.

    `“`, `”` and (with `apostrophe_quotes`) `'` count as `"`. An opening quote ends its stretch, a
    closing one begins the next. A quoted character gets typographic quotes around it, so that it is
    tokenised as the start of a word.

    Args:
        text: the whole chat text, template included.
        offset: quotes up to and including this character index do not count (they belong to the
            fixed prefix).
        apostrophe_quotes: take the `'` of "girl's" for a quote as well: a quirk of the released
            models, whose weights were trained with it.

    Returns:
        The pieces in order. Without the added quotes, they join to the text (its quotes unified).
    """
    same = {_OPENING: '"', _CLOSING: '"'} | ({"'": '"'} if apostrophe_quotes else {})
    pieces: list[Piece] = []
    stretch = ""
    inside = False
    for index, char in enumerate(text.translate(str.maketrans(same))):
        if char == '"' and index > offset:
            stretch += char
            if not inside:
                pieces.append(Piece(stretch, quoted=False))
                stretch = ""
            inside = not inside
        elif inside:
            pieces.append(Piece(f"{_OPENING}{char}{_CLOSING}", quoted=True))
        else:
            stretch += char
    if stretch:
        pieces.append(Piece(stretch, quoted=False))
    return pieces


def tokenize_quoted(
    tokenizer: PreTrainedTokenizerFast, text: str, *, offset: int, apostrophe_quotes: bool
) -> tuple[list[int], list[bool]]:
    """Token ids of a chat text with its quoted text split by character.

    Each piece is tokenised alone. Where both added quotes of a character became tokens of their own
    they are taken off; where one merged with the character they stay, as the weights saw it.

    Args:
        tokenizer: of the checkpoint.
        text: the whole chat text.
        offset: see `split_quoted`.
        apostrophe_quotes: see `split_quoted`.

    Returns:
        The ids, and for each whether it stands for quoted text.
    """
    opening, closing = (tokenizer.encode(mark, add_special_tokens=False) for mark in "“”")
    ids: list[int] = []
    quoted: list[bool] = []
    for piece in split_quoted(text, offset=offset, apostrophe_quotes=apostrophe_quotes):
        new = tokenizer.encode(piece.text, add_special_tokens=False)
        if new[: len(opening)] == opening and new[-len(closing) :] == closing:
            new = new[len(opening) : -len(closing)]
        ids += new
        quoted += [piece.quoted] * len(new)
    return ids, quoted
