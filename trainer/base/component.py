"""What every component is: one small frozen class whose fields are its YAML; and the registry of
all of them.

A kind (a schedule, a loss, a norm ...) is an abstract class that has `kind` in its own body. A
component is a class below it with a `name` of its own: to define the class is to register it, here
or in anybody's file. What core code has to know of a component the kind's hooks answer; those whose
absence would be a silent error are abstract, and a class that lacks one is refused where it is
defined.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeGuard, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticKnownError, core_schema

from trainer.base import streams
from trainer.base.errors import UserError


class ComponentError(UserError):
    """A class that cannot be a component: its name is taken, or it lacks what its kind asks for."""


class StrictModel(BaseModel):
    """A frozen, strict part of a recipe: unknown keys, wrong types, NaN and infinity are refused.

    Sequences are tuples, so that a recipe is immutable all the way down. A field that may be absent
    defaults to None or False, which means off: a recipe never gets a number that nobody wrote.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    file_is: ClassVar[str] = "recipe"  # what the file is called whose whole this class is


def is_kind(cls: type) -> TypeGuard[type[Component]]:
    """Is this a kind, of which a recipe holds one component or another?"""
    return "kind" in vars(cls)


def tag_of(cls: type[BaseModel]) -> str | None:
    """The name that chooses a component's class; None for a section, which is not chosen."""
    field = getattr(cls, "model_fields", {}).get("name")
    return (
        get_args(field.annotation)[0] if field and get_origin(field.annotation) is Literal else None
    )


_AS_IT_IS = core_schema.plain_serializer_function_ser_schema(
    lambda part, info: part.model_dump(mode=info.mode, exclude_none=info.exclude_none),
    info_arg=True,
)
_REGISTRY: dict[type[Component], dict[str, type[Component]]] = {}


class Component(StrictModel):
    """One exchangeable part of a recipe. Its `name` chooses the class; its one method is its
    mathematics.

    kind: in the body of an abstract class, what the classes below it are one of, as messages say
    it. defined_in: of a kind whose components stand above those who read recipes, the package that
    defines them; it is imported once they are asked for. example: fields, `name` left out, as its
    source has them: what documentation and tests make it with.
    """

    kind: ClassVar[str]
    defined_in: ClassVar[str | None] = None
    example: ClassVar[dict[str, Any]] = {}

    if TYPE_CHECKING:  # the field of each class below; a section that is not chosen has none

        @property
        def name(self) -> str: ...

    @property
    def purpose(self) -> str | None:
        """The random stream (trainer.base.streams) that it draws from; None: it draws nothing."""
        return None

    def check(self, plan) -> None:
        """Refuse a plan (trainer.recipe.plan.Plan) that this part does not fit, in units that only
        a plan knows.

        Raises UserError.
        """

    def check_settings(self, plan, settings) -> None:
        """Refuse a machine, or settings of it, on which this part cannot work. Raises UserError."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options) -> None:
        super().__pydantic_init_subclass__(**options)
        name = tag_of(cls)
        if name is not None and all(tag_of(base) != name for base in cls.__mro__[1:]):
            _register(name, cls)

    @classmethod
    def __get_pydantic_core_schema__(cls, source, handler):
        """Of a kind: any of its components, by the name in the data and the registry as it then
        is.
        """
        if not is_kind(cls):
            return handler(source)
        return core_schema.with_info_plain_validator_function(cls._chosen, serialization=_AS_IT_IS)

    @classmethod
    def _chosen(cls, data: Any, info) -> Component:
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise PydanticKnownError("model_attributes_type")
        if "name" not in data:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'name'"})
        known = {str(tag_of(one)): one for one in registered(cls)}
        found = known.get(data["name"]) if isinstance(data["name"], str) else None
        if found is None:
            tags = ", ".join(map(repr, known))
            context = {"discriminator": "'name'", "tag": str(data["name"]), "expected_tags": tags}
            raise PydanticKnownError("union_tag_invalid", context)
        return (
            found.model_validate_json(json.dumps(data))
            if info.mode == "json"
            else found.model_validate(data)
        )


def registered(kind: type[Component]) -> tuple[type[Component], ...]:
    """All components of a kind, in the order in which they were defined."""
    if is_kind(kind) and kind.defined_in:
        importlib.import_module(kind.defined_in)
    return tuple(_REGISTRY.get(kind, {}).values())


def kinds() -> tuple[type[Component], ...]:
    """All kinds that have a component."""
    return tuple(_REGISTRY)


def parts_of(recipe: StrictModel) -> Iterator[Component]:
    """All components in a recipe, each before its own parts."""
    if isinstance(recipe, Component):
        yield recipe
    for _, value in recipe:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, StrictModel):
                yield from parts_of(part)


def _register(name: str, cls: type[Component]) -> None:
    where = f"{cls.__module__}.{cls.__qualname__}"
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise ComponentError(
            f"{where}: a {cls.kind} needs {missing}; write {'them' if ', ' in missing else 'it'} as"
            f" {cls.__mro__[1].__name__} says"
        )
    of = [base for base in cls.__mro__ if is_kind(base)]
    for kind in of:
        there = _REGISTRY.setdefault(kind, {}).get(name)
        # the same class once more, as when a cell of a notebook runs again, takes the place of the
        # one before
        if there is not None and f"{there.__module__}.{there.__qualname__}" != where:
            raise ComponentError(
                f"{where}: the {kind.kind} {name} is {there.__module__}.{there.__qualname__}"
                " already; choose another name"
            )
    for kind in of:
        _REGISTRY[kind][name] = cls
    if isinstance(cls.purpose, str):
        streams.add_purpose(cls.purpose)


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
