"""Arrow arrays -> the values that the same rows have in JSON.

What is promised:
- `arrow.json`, which `datasets` writes for mixed objects, is parsed at any depth;
- a struct's null fields are left out, at any depth: a table cannot tell them from absent ones. What
  is null inside `arrow.json` stays null;
- a map is an object, a dictionary or a run-end-encoded array its values, a list view a list;
- what JSON cannot hold (a date, bytes, a union) is a `NoJson` with its type, never its text.
"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from roll_sft.data.rows.checks import NoJson
from roll_sft.data.rows.json_values import check_unique, parsed_json

_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_SCALARS = (*_TEXTS, pa.types.is_null, pa.types.is_boolean, pa.types.is_integer)


def values_of(array: pa.Array, *, where: str) -> list[object]:
    """Return the value of each entry, None for null; `where` names the array in errors.

    Raises `BadRowError` for JSON that is broken, `UnicodeDecodeError` for text that is not UTF-8.
    """
    kind = array.type
    if pa.types.is_struct(kind):
        return _objects(array, where=where)
    if any(is_list(kind) for is_list in _LISTS):
        lengths = pc.list_value_length(array).to_pylist()
        return list(_cut(values_of(array.flatten(), where=where), lengths))
    if pa.types.is_map(kind):
        return _maps(array, where=where)
    if isinstance(kind, pa.BaseExtensionType):
        return _extension_values(array, where=where)
    if pa.types.is_dictionary(kind):
        return values_of(array.dictionary_decode(), where=where)
    if pa.types.is_run_end_encoded(kind):
        return values_of(pc.run_end_decode(array), where=where)
    if any(is_scalar(kind) for is_scalar in _SCALARS) or pa.types.is_floating(kind):
        values: list[object] = array.to_pylist()
        return values
    # Not converted: a date can lie where Python has none.
    other = NoJson(str(kind))
    return [other if is_valid else None for is_valid in array.is_valid().to_pylist()]


def _objects(array: pa.StructArray, *, where: str) -> list[object]:
    names = [field.name for field in array.type]
    check_unique(names, where=where)
    columns = [
        values_of(column, where=f"{where}.{name}")
        for name, column in zip(names, array.flatten(), strict=True)
    ]
    found = zip(*columns, strict=True) if columns else iter([()] * len(array))
    objects: list[object] = [
        {name: value for name, value in zip(names, row, strict=True) if value is not None}
        for row in found
    ]
    if array.null_count:
        is_valid = array.is_valid().to_pylist()
        return [each if valid else None for each, valid in zip(objects, is_valid, strict=True)]
    return objects


def _maps(array: pa.MapArray, *, where: str) -> list[object]:
    offsets = array.offsets.to_pylist()
    is_valid = array.is_valid().to_pylist()
    names = values_of(array.keys[offsets[0] : offsets[-1]], where=f"a key of {where}")
    values = values_of(array.items[offsets[0] : offsets[-1]], where=where)
    maps: list[object] = []
    for index, valid in enumerate(is_valid):
        part = slice(offsets[index] - offsets[0], offsets[index + 1] - offsets[0])
        if not valid:
            maps.append(None)
        elif all(isinstance(name, str) for name in names[part]):
            check_unique([str(name) for name in names[part]], where=where)
            maps.append(dict(zip(names[part], values[part], strict=True)))
        else:
            maps.append(NoJson(str(array.type)))
    return maps


def _extension_values(array: pa.ExtensionArray, *, where: str) -> list[object]:
    stored = values_of(array.storage, where=where)
    if array.type.extension_name != "arrow.json":
        return stored
    return [
        parsed_json(text, where=where) if isinstance(text, str) else text  # null
        for text in stored
    ]


def _cut(values: list[object], lengths: list[int | None]) -> Iterator[object]:
    start = 0
    for length in lengths:
        if length is None:
            yield None
        else:
            yield values[start : start + length]
            start += length
