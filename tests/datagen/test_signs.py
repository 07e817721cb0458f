from dataclasses import replace

import numpy as np
import pytest

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators.text import CHINESE, LATIN
from step1x_edit.datagen.signs import Sign, draw_sign
from step1x_edit.datagen.vocabulary import COLOURS

SIZE = (96, 128)


@pytest.fixture(scope="module")
def atlas():
    return Atlas()


def sign(**changes):
    return replace(Sign("OPEN", 0.5, 0.5, 0.3, 0.6, "red"), **changes)


def letters(board, atlas):
    """Pixels that differ from the empty board."""
    empty = draw_sign(replace(board, text=""), atlas, SIZE)
    return (np.abs(draw_sign(board, atlas, SIZE) - empty) > 0.2).any(-1)


@pytest.mark.parametrize("text", [*LATIN, *CHINESE])
def test_every_word_is_drawn_within_its_board(text, atlas):
    drawn = letters(sign(text=text), atlas)
    assert drawn.shape == (29, 77)
    assert 0.02 < drawn.mean() < 0.6
    assert not drawn[[0, -1]].any()
    assert not drawn[:, [0, -1]].any()


def test_every_chinese_letter_has_its_own_form(atlas):
    forms = {}
    for letter in sorted(set("".join(CHINESE))):
        drawn = letters(sign(text=letter), atlas).tobytes()
        assert drawn not in forms, f"{letter} looks like {forms.get(drawn)}: not in the font?"
        forms[drawn] = letter


@pytest.mark.parametrize("colour", COLOURS)
def test_letters_stand_out_from_the_board(colour, atlas):
    board = sign(colour=colour, text="NO")
    inside = letters(board, atlas)
    drawn = draw_sign(board, atlas, SIZE)
    ink = drawn[inside, :3].mean()
    around = drawn[5:-5, 5:-5][~inside[5:-5, 5:-5], :3].mean()
    assert abs(ink - around) > 0.18
