"""Edit a picture from Python.

    python examples/edit_picture.py examples/coffee.jpg "make it black and white" out.png [MODEL]

The saved file says how it was made; `read_provenance` reads that back.
"""

import sys
from pathlib import Path

from step1x_edit import Editor, EditRequest
from step1x_edit.request import read_provenance

picture, instruction, out, *model = sys.argv[1:]
editor = Editor.load(*model)
result = editor.edit(EditRequest(image=Path(picture), prompt=instruction, seed=1))
for path in result.save([Path(out)]):
    provenance = read_provenance(path)
    assert provenance is not None
    sys.stdout.write(f"{path}: {provenance.prompt!r}, seed {provenance.seed}\n")
