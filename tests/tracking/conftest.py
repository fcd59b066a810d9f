"""What the tests of several trackers share."""

import pytest

from roll_sft.tracking import mlflow_run


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """A database with all tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    path.touch()
    mlflow_run._make_tables(path, mlflow_run._import_client())
    return path
