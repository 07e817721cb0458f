"""The edit categories, one file each.

An operator turns a random generator into a scene, its edit and the wording.

To add a category: write ``operators/<name>.py`` with a function of the `Operator` form, enter it in
`OPERATORS`, and give it its phrasings in `captions`.
"""

from step1x_edit.datagen.operators.addition import addition
from step1x_edit.datagen.operators.background import background
from step1x_edit.datagen.operators.base import Edit, Operator
from step1x_edit.datagen.operators.colour import colour
from step1x_edit.datagen.operators.material import material
from step1x_edit.datagen.operators.motion import motion
from step1x_edit.datagen.operators.portrait import portrait
from step1x_edit.datagen.operators.removal import removal
from step1x_edit.datagen.operators.replacement import replacement
from step1x_edit.datagen.operators.style import style
from step1x_edit.datagen.operators.text import text
from step1x_edit.datagen.operators.tone import tone

OPERATORS: dict[str, Operator] = {
    "tone": tone,
    "colour": colour,
    "removal": removal,
    "background": background,
    "addition": addition,
    "replacement": replacement,
    "material": material,
    "text": text,
    "motion": motion,
    "portrait": portrait,
    "style": style,
}

__all__ = ["OPERATORS", "Edit", "Operator"]
