"""The edit categories, one file each.

An operator turns a random generator into a scene, its edit and the wording.

To add a category: write ``operators/<name>.py`` with a function that edits a scene (`SceneEdit`),
enter it in `OPERATORS`, and give its kinds their wordings in ``phrasings.json``.
"""

from step1x_edit.datagen.operators.addition import addition, scene_with_room
from step1x_edit.datagen.operators.background import background
from step1x_edit.datagen.operators.base import Context, Edit, Operator, on_scene
from step1x_edit.datagen.operators.colour import colour
from step1x_edit.datagen.operators.material import material
from step1x_edit.datagen.operators.motion import motion
from step1x_edit.datagen.operators.portrait import portrait
from step1x_edit.datagen.operators.removal import removal
from step1x_edit.datagen.operators.replacement import replacement
from step1x_edit.datagen.operators.style import style
from step1x_edit.datagen.operators.text import text
from step1x_edit.datagen.operators.tone import scene_of_any_number, tone

OPERATORS: dict[str, Operator] = {
    "tone": on_scene(tone, scene_of_any_number),
    "colour": on_scene(colour),
    "removal": on_scene(removal),
    "background": on_scene(background),
    "addition": on_scene(addition, scene_with_room),
    "replacement": on_scene(replacement),
    "material": on_scene(material),
    "text": Operator(text),
    "motion": on_scene(motion),
    "portrait": Operator(portrait),
    "style": Operator(style),
}

__all__ = ["OPERATORS", "Context", "Edit", "Operator"]
