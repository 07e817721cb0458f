"""Material modification: an object becomes one of gold, wood, glass …; its form stays."""

from step1x_edit.datagen.materials import MATERIALS
from step1x_edit.datagen.operators.base import Context, Edit
from step1x_edit.datagen.operators.referring import choose, refer
from step1x_edit.datagen.scene import Scene


def material(context: Context, scene: Scene) -> Edit | None:
    """Make one of the scene's objects of a named material."""
    index = choose(context, scene)
    if index is None:
        return None
    wanted = context.pick(MATERIALS)
    words = refer(context, scene, index).words()
    words["en"]["material"] = MATERIALS[wanted].en
    words["zh"]["material"] = MATERIALS[wanted].zh
    return Edit(scene, scene.with_object(index, material=wanted), "material", words)
