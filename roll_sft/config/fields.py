"""What the schema declares, read from its dataclasses: every key, its type and its choices.

Help, documentation, builder and checks read the keys from here, so that none is listed twice.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `name` is dotted; `data.train.path` is the key of every entry of the list."""

    name: str
    kind: Any  # the annotation, such as `int | None`
    default: Any
    about: Mapping[str, Any]  # see `keys.key`

    @property
    def sentence(self) -> str:
        """What the key does."""
        return str(self.about["sentence"])

    @property
    def unit(self) -> str:
        """What a number counts or measures; empty for a bare number or a text."""
        return str(self.about["unit"])

    @property
    def is_text(self) -> bool:
        """Whether the key takes text, or a list of texts."""
        is_mixed = section_of(self.kind) not in (None, *get_args(self.kind))
        return bool(self.choices) or _item_type(self.kind) is str or is_mixed

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts that the key takes; empty where any text will do."""
        return choices_of(self.kind)


def all_keys(cls: Any, prefix: str = "") -> Iterator[Key]:
    """Every key of the dataclass `cls` and of its sections, in their order."""
    for item in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(item.type):
            default = item.default
            if item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
            yield Key(f"{prefix}{item.name}", item.type, default, item.metadata)
        if (inner := section_of(item.type)) is not None:
            yield from all_keys(inner, f"{prefix}{item.name}.")


def all_names(cls: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys and sections of `cls`."""
    for item in dataclasses.fields(cls):
        yield f"{prefix}{item.name}"
        if (inner := section_of(item.type)) is not None:
            yield from all_names(inner, f"{prefix}{item.name}.")


def section_of(kind: Any) -> Any:
    """The dataclass that a field of type `kind` holds, itself or in a list; None for a value."""
    inner = get_args(kind)[0] if get_origin(kind) is list else kind
    return next(filter(dataclasses.is_dataclass, (inner, *get_args(inner))), None)


def without_null(kind: Any) -> tuple[Any, bool]:
    """`kind` without `None`, and whether it allows `None`."""
    if type(None) not in get_args(kind):
        return kind, False
    (inner,) = (each for each in get_args(kind) if each is not type(None))
    return inner, True


def one_or_list(kind: Any) -> tuple[Any, Any] | None:
    """(type of one value, list type) where `kind` takes either, such as `str | list[int]`."""
    args = get_args(kind)
    is_either = len(args) == 2 and get_origin(args[1]) is list
    return args if is_either else None


def choices_of(kind: Any) -> tuple[str, ...]:
    """The texts of a `Literal`, also of one that is optional or in a list; empty for others."""
    if (either := one_or_list(kind)) is not None:
        kind = either[0]
    inner = _item_type(kind)
    return get_args(inner) if get_origin(inner) is Literal else ()


def _item_type(kind: Any) -> Any:
    inner, _ = without_null(kind)
    return get_args(inner)[0] if get_origin(inner) is list else inner
