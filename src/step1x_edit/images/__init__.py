"""Pictures in and out: read and check, the size rule, put an edit back, save with provenance."""

from step1x_edit.images.mask import open_mask
from step1x_edit.images.read import MAX_PIXELS, Picture, open_picture
from step1x_edit.images.restore import Keep, restore
from step1x_edit.images.save import SAVE_SUFFIXES, check_output, read_provenance_json, save
from step1x_edit.images.size import fit_size, prepare

__all__ = [
    "MAX_PIXELS",
    "SAVE_SUFFIXES",
    "Keep",
    "Picture",
    "check_output",
    "fit_size",
    "open_mask",
    "open_picture",
    "prepare",
    "read_provenance_json",
    "restore",
    "save",
]
