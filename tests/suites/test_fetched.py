"""Says so if transformers' own suites did not run."""

from importlib.metadata import version

import pytest
from fetch import suites_folder


def test_the_suites_of_the_installed_transformers_are_here() -> None:
    if not suites_folder().is_dir():
        pytest.skip(f"NOT RUN: the suites of transformers {version('transformers')}. `make suites` fetches them.")
    assert (suites_folder() / "test_modeling_common.py").is_file()
