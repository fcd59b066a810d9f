"""A machine with a GPU and little else, for a Python process with this folder on its path.

torch, megatron-core, transformers and what these bring are there; the packages below are not:
neither imported nor found, nor their metadata, by which transformers asks for some.
"""

import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder
from types import ModuleType

MISSING = {"datasets", "hydra", "mlflow", "omegaconf", "psutil", "pyarrow", "ray", "rich"}
PROJECTS = MISSING | {"hydra-core", "mlflow-skinny", "mlflow-tracing"}


class BareFinder(PathFinder):
    """Python's finder of installed packages, less those that are missing."""

    @classmethod
    def find_spec(
        cls,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Nothing for a missing package."""
        if fullname.partition(".")[0] in MISSING:
            return None
        return super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(  # type: ignore[override]
        cls, context: DistributionFinder.Context | None = None
    ) -> Iterable[Distribution]:
        """Those that are not of a missing package."""
        found = super().find_distributions(context or DistributionFinder.Context())
        return (each for each in found if each.metadata["Name"].lower() not in PROJECTS)


sys.meta_path[sys.meta_path.index(PathFinder)] = BareFinder
