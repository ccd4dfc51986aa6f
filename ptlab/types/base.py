"""The two families of pydantic values: requests refuse unknown fields, results ignore them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class RequestModel(BaseModel):
    """Immutable; an unknown field is an error, so that a typo in a request is found where it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __str__(self) -> str:
        return repr(self)


class ResultModel(BaseModel):
    """Immutable; unknown fields are dropped, so that an older client reads a newer result."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    def __str__(self) -> str:
        return repr(self)
