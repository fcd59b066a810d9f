"""What a URL names in a store that fsspec opens (`s3://...`, `memory://...`)."""

from collections.abc import Mapping

import fsspec
from fsspec.registry import known_implementations

from roll_sft.base.errors import DataError, first_line


def list_url(url: str, *, is_pattern: bool) -> tuple[str, Mapping[str, str], bool]:
    """Return the place of `url` in its store, its files, and whether it is a folder.

    The files are place -> URL; none if nothing has this name. Raises `DataError` for a store that
    cannot be listed.
    """
    try:
        store, place = fsspec.url_to_fs(url)
        is_folder = not is_pattern and store.isdir(place)
        if is_pattern:
            found = [name for name in store.glob(place) if store.isfile(name)]
        elif is_folder:
            found = store.find(place)
        else:
            found = [place] if store.exists(place) else []
    except ImportError as error:
        protocol = url.partition("://")[0]
        package = known_implementations.get(protocol, {}).get("err") or first_line(error)
        raise DataError(f"{url}: {protocol}:// needs a package: {package}") from error
    except ValueError as error:  # a protocol that fsspec does not know
        raise DataError(f"{url}: {first_line(error)}; check the beginning of the URL") from error
    except Exception as error:
        # Each store has errors of its own: of the network, of credentials, of its own classes.
        raise DataError(f"{url}: cannot be listed ({first_line(error)})") from error
    return place, {name: store.unstrip_protocol(name) for name in found}, is_folder
