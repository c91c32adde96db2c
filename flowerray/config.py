"""The base of every typed configuration."""

from contextvars import ContextVar
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from flowerray.errors import UserError

_INSIDE: ContextVar[bool] = ContextVar("inside another configuration", default=False)


class Config(BaseModel):
    """Frozen, refuses unknown keys; the docstring under a field is its help text and names its
    unit.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        # The line breaks of a docstring are the editor's; help text breaks its lines anew.
        for field in cls.model_fields.values():
            if field.description:
                field.description = " ".join(field.description.split())

    def __init__(self, **fields: Any) -> None:
        """Checks every field.

        Raises:
            UserError: the first field that does not fit, in this or in a part of it, and why.
        """
        inside, token = _INSIDE.get(), _INSIDE.set(True)
        try:
            super().__init__(**fields)
        except ValidationError as error:
            if inside:  # pydantic adds the field that this is the value of
                raise
            raise UserError(first_fault(error)) from error
        finally:
            _INSIDE.reset(token)

    @classmethod
    def part_of(cls, options: BaseModel, **changes: Any) -> Self:
        """This configuration out of a larger one that has all its fields, with some changed."""
        return cls(**{name: getattr(options, name) for name in cls.model_fields} | changes)


def first_fault(error: ValidationError) -> str:
    """The first fault of a validation, as one sentence."""
    fault = error.errors()[0]
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"there is no option `{name}`."
    return f"`{name}` = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}."
