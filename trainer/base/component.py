"""What every ingredient is: one small frozen class whose fields are its YAML."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Page(BaseModel):
    """A frozen, strict part of a page: unknown keys, wrong types, NaN and infinity are refused.

    Sequences are tuples, so that a page is immutable all the way down. A field that may be absent defaults to None or
    False, which means off: a page never gets a number that nobody wrote.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Ingredient(Page):
    """One exchangeable part of a recipe. Its `name` chooses the class; its one method is its mathematics."""


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
