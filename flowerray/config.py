"""The base of every typed configuration."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from flowerray.errors import UserError


class Config(BaseModel):
    """Frozen, refuses unknown keys; the docstring under a field is its help text and names its
    unit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        # The line breaks of a docstring are the editor's; help text breaks its lines anew.
        for field in cls.model_fields.values():
            if field.description:
                field.description = " ".join(field.description.split())

    def __init__(self, **fields: Any) -> None:
        """Checks every field.

        Raises:
            UserError: the first field that does not fit, and why.
        """
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise UserError(first_fault(error)) from error


def first_fault(error: ValidationError) -> str:
    """The first fault of a validation, as one sentence."""
    fault = error.errors()[0]
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"there is no option {name}."
    if isinstance(inner := fault.get("ctx", {}).get("error"), UserError):  # a Config in a Config
        return f"{name}: {inner}" if name else str(inner)
    return f"{name} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}."
