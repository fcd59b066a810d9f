"""A dataset of the Hugging Face hub -> the Arrow files that `datasets` keeps of it on this machine.

`datasets` downloads what is not in its own cache (HF_HOME) and writes one Arrow table for each
split, which is read as a local one from then on. No code of a dataset is run.
"""

import re

import datasets

from roll_sft.base.errors import DataError, first_line

_SPLIT = re.compile(r"\w+(\.\w+)*")


def hub_files(path: str, *, split: str | None) -> list[str]:
    """Return the files of `split` in order; without `split`, of the only one there is.

    Raises `DataError` if the hub does not give the dataset, and without a choice among splits.
    """
    if split is not None and not _SPLIT.fullmatch(split):
        raise DataError(
            f"{path}: split '{split}' is no name; give one such as train, and samples or weight to "
            f"take a part of it"
        )
    name, _, configuration = path[path.index("/") + 1 :].partition("/")
    repository = f"{path.partition('/')[0]}/{name}"
    try:
        builder = datasets.load_dataset_builder(repository, configuration or None)
        builder.download_and_prepare()
    except Exception as error:
        # From the network, the hub, the parsers: hundreds of classes without a common base.
        raise DataError(
            f"{path}: no such file or folder here, and the hub does not give a dataset of that "
            f"name ({first_line(error)}); check the path, the network and HF_ENDPOINT, or a "
            f"configuration as org/name/configuration"
        ) from error
    found = list(builder.info.splits)
    if split is None and len(found) > 1:
        raise DataError(
            f"{path}: has the splits {', '.join(found)}; choose one as the source's split"
        )
    chosen = found[0] if split is None else split
    if chosen not in found:
        raise DataError(
            f"{path}: has no split '{split}' (found: {', '.join(found)}); correct the split"
        )
    return [entry["filename"] for entry in builder.as_dataset(split=chosen).cache_files]
