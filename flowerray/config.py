"""The base of every typed configuration."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen, refuses unknown keys; the docstring under a field is its help text and names its unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
