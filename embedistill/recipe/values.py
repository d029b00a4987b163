"""Kinds of values that sections of a recipe have, and what a section is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Dtype = Literal["auto", "float32", "bfloat16"]
Phase = Literal["all", "pairs", "queries"]
Storage = Literal["float32", "float16", "bfloat16", "int8"]
Fault = Literal["not-finite", "zero-norm", "cut", "equal", "outlier"]


class Section(BaseModel):
    """A closed set of settings: unknown ones are refused, and none can be changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
