"""What transformers' own suites need around them: their marks, MARS in the Auto classes, and no unexplained skip."""

import random
import re
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
from deviations import LIBRARY_SKIPS, SKIPPED
from fetch import suites_folder

MARKS = "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test torch_compile_test order"
MARKS += " is_tensor_parallel_test"

collect_ignore = ["transformers_tests"]
if not suites_folder().is_dir():
    collect_ignore += ["test_model_suite.py", "test_processing_suite.py", "test_deviations.py"]


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS.split():
        config.addinivalue_line("markers", f"{mark}: of transformers' own suites")


@pytest.fixture(scope="module", autouse=True)
def mars_in_the_auto_classes() -> Iterator[None]:
    """The suites ask by name which class is a trunk and which has labels; the library's models stand in its lists."""
    from transformers.models.auto import modeling_auto

    import mars_hf

    mars_hf.register()
    with (
        patch.dict(modeling_auto.MODEL_MAPPING_NAMES, mars="MarsModel"),
        patch.dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, mars="MarsForConditionalGeneration"),
    ):
        yield


@pytest.fixture(autouse=True)
def seed_of_the_suites() -> None:
    """The suites draw from these too."""
    random.seed(0)
    np.random.seed(0)


def unwanted_skip(report: pytest.TestReport) -> str | None:
    """The reason of a suite's skip that `deviations.py` does not know; empty if it does, None without a skip."""
    path = report.nodeid.split("::")
    if not report.skipped or len(path) != 3 or path[1] not in SKIPPED or not isinstance(report.longrepr, tuple):
        return None
    reason = report.longrepr[2].removeprefix("Skipped: ")
    known = reason in SKIPPED[path[1]].values() or any(re.search(pattern, reason) for pattern in LIBRARY_SKIPS)
    return "" if known else reason


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator:
    """Let no test of a suite be skipped for a reason that `deviations.py` does not know."""
    report = yield
    if reason := unwanted_skip(report):
        report.outcome, report.longrepr = "failed", f"Skipped, and `deviations.py` does not say why: {reason}"
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Count explained skips apart: a hundred lines of them would hide the one that matters."""
    if report.when != "teardown" and unwanted_skip(report) == "":
        return "explained skips", "s", "SKIPPED"
    return None
