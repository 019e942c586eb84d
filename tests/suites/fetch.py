"""
Fetches transformers' own common tests: pip downloads the source distribution of the version that is installed, and
its `tests` folder is unpacked under `.suites/`, which git ignores. What is there already is not fetched again.

    python tests/suites/fetch.py
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".suites"
COMMON_TEST = re.compile(r"transformers-[^/]+/tests/(\w+\.py)")


def suites_folder() -> Path:
    """Where the tests of the installed transformers belong, whether they are there or not."""
    return CACHE / f"transformers-{version('transformers')}" / "tests"


def download(folder: str) -> Path:
    """Have pip download the source distribution of the installed transformers into `folder`."""
    requirement = f"transformers=={version('transformers')}"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", "transformers", "--dest", folder]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{requirement} was not fetched, so its suites will not run. pip says:\n{done.stderr}")
    return next(Path(folder).glob("transformers-*.tar.gz"))


def unpack(archive: Path, target: Path) -> None:
    """Unpack the common tests of a source distribution into `target`, as a package: all of them or none."""
    part = target.with_name("tests.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with tarfile.open(archive) as source:
        for member in source:
            if match := COMMON_TEST.fullmatch(member.name):
                (part / match[1]).write_bytes(source.extractfile(member).read())
    if not (part / "test_modeling_common.py").is_file():
        raise SystemExit(f"{archive.name} holds no tests/test_modeling_common.py: its suites will not run.")
    (part / "__init__.py").touch()
    part.rename(target)


def main() -> None:
    target = suites_folder()
    if not target.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            unpack(download(folder), target)
    print(f"transformers' own suites: {target.relative_to(CACHE.parent)}")


if __name__ == "__main__":
    main()
