"""How many ways of saying and changing things the engine draws from."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from step1x_edit.datagen.captions import Tier


class Variety(BaseModel):
    """Shares of what goes beyond one named object and one short sentence; the default has all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    wordings: Tier = Field(default="all", description="plain, all, or held_out for evaluation")
    tones: Literal["formulas", "all"] = Field(
        default="all", description="formulas alone, or weather, light and restoration too"
    )
    grey: float = Field(
        default=0, ge=0, le=1, description="tones that take all colour out, beside their own share"
    )
    referring: float = Field(
        default=0.3, ge=0, le=1, description='"the left cat" rather than "the cat", often of two'
    )
    counts: float = Field(default=0.15, ge=0, le=1, description='"two cats", "all the cats"')
    compound: float = Field(default=0.1, ge=0, le=1, description="a second edit follows the first")
    learned_styles: float = Field(
        default=0, ge=0, le=1, description="style edits that a network paints (extra `photos`)"
    )
    unchanged: float = Field(
        default=0.02, ge=0, le=1, description="what is asked for is not there, or nothing is"
    )


EVERYTHING = Variety()
PLAIN = Variety(wordings="plain", tones="formulas", referring=0, counts=0, compound=0, unchanged=0)
"""One edit of one thing that its name tells apart, in a short sentence."""
