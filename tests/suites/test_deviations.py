"""Holds the suites to `deviations.py`: nothing else is skipped, replaced or set."""

import inspect
from pathlib import Path

import pytest
import test_model_suite
import test_processing_suite
from deviations import REPLACED, SETTINGS, SKIPPED

HERE = Path(__file__).parent
# `unittest` asks for these, and the suites add to them.
FRAME = {"setUp", "_abc_impl"}
# By module: a suite that is imported by name would run here once more.
suites = pytest.mark.parametrize(
    "suite",
    [
        test_model_suite.MarsModelSuite,
        test_processing_suite.MarsProcessorSuite,
        test_processing_suite.MarsImageProcessorSuite,
    ],
)


def library_names(suite: type) -> set[str]:
    """What the library's classes under a suite define."""
    bases = [base for base in suite.__mro__ if base.__module__.startswith("transformers_tests.test_")]
    return {name for base in bases for name in vars(base) if not name.startswith("__")}


def is_ours(value: object) -> bool:
    """Whether a suite's attribute was written here; the library wraps its own tests anew for every suite."""
    function = inspect.unwrap(getattr(value, "__func__", value))
    return not inspect.isfunction(function) or Path(function.__code__.co_filename).parent == HERE


@suites
def test_all_that_a_suite_replaces_or_sets_is_listed(suite: type) -> None:
    skipped = SKIPPED[suite.__name__]
    changed = {name for name, value in vars(suite).items() if name not in skipped and is_ours(value)}
    listed = {*REPLACED[suite.__name__], *SETTINGS[suite.__name__]}
    assert (changed & library_names(suite)) - FRAME == listed


@suites
def test_what_is_listed_as_skipped_is_a_test_of_the_library_and_skipped_for_that_reason(suite: type) -> None:
    for name, reason in SKIPPED[suite.__name__].items():
        assert name in library_names(suite), name
        assert getattr(suite, name).__unittest_skip_why__ == reason


@suites
def test_a_replaced_test_is_a_test_of_the_library(suite: type) -> None:
    assert REPLACED[suite.__name__].keys() <= library_names(suite)
