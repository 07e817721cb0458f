"""Quoted text, one character at a time: how the released models learned to draw letters.

An instruction such as `change the sign to "OPEN"` is tokenised normally outside the quotes and letter by letter inside
them, so that every letter to be drawn has a feature of its own. Called by `InstructionTokenizer`; plain functions over a
tokenizer, no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENING, _CLOSING = "“", "”"


class Piece(NamedTuple):
    """A stretch of text that is tokenised alone; `quoted` marks one character of quoted text."""

    text: str
    quoted: bool


def split_quoted(text: str, *, offset: int, apostrophe_quotes: bool) -> list[Piece]:
    """Cut a rendered chat text into stretches outside quotes and single quoted characters.

    `“`, `”` and (with `apostrophe_quotes`) `'` count as `"`. An opening quote ends its stretch, a closing one begins
    the next. A quoted character keeps typographic quotes around it, so that it is tokenised as the start of a word.

    Args:
        text: the whole chat text, template included.
        offset: quotes up to and including this character index do not toggle (they belong to the fixed prefix).
        apostrophe_quotes: the released models take the `'` of "girl's" for a quote as well. It is a quirk, but the
            weights were trained with it.

    Returns:
        The pieces in order. Joined, with the added quotes taken off, they give the text back.
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
    tokenizer: PreTrainedTokenizerBase, text: str, *, offset: int, apostrophe_quotes: bool
) -> tuple[list[int], list[bool]]:
    """Token ids of a chat text with its quoted text split by character.

    Each piece is tokenised alone. Where both typographic quotes of a quoted character became tokens of their own, they
    are taken off; where one of them merged with the character, the merged token stays, as the weights saw it.

    Returns:
        The ids, and for each whether it stands for quoted text.
    """
    opening, closing = (tokenizer.encode(mark, add_special_tokens=False) for mark in "“”")
    ids: list[int] = []
    quoted: list[bool] = []
    for piece in split_quoted(text, offset=offset, apostrophe_quotes=apostrophe_quotes):
        new = tokenizer.encode(piece.text, add_special_tokens=False)
        if new[:1] == opening and new[-1:] == closing:
            new = new[1:-1]
        ids += new
        quoted += [piece.quoted] * len(new)
    return ids, quoted
