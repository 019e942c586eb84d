"""
The notebook for readers: what is stored runs, and what is shown came from it.

If the first test fails, its message holds the cell and its error. After a change, execute the notebook again and look
at it: `jupyter execute --inplace examples/inference.ipynb`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "inference.ipynb"
MAX_BYTES = 300_000  # of outputs with all


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict[str, Any]) -> list[str]:
    """MIME types of what a cell shows, apart from what it prints."""
    results = [output for output in cell["outputs"] if output["output_type"] != "stream"]
    return [kind for output in results for kind in sorted(output.get("data", ["error"]))]


def printed(cells: list[dict[str, Any]]) -> str:
    """All that cells print, warnings included."""
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell["outputs"])


@pytest.mark.integration
def test_every_cell_runs_and_shows_what_the_stored_one_shows(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    stored = code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        cell["outputs"] = []
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()  # raises what a cell raises
    assert [shown(cell) for cell in code_cells(notebook)] == [shown(cell) for cell in stored]
    assert "`codes_per_step=4` was not trained for" in printed(code_cells(notebook))
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind


def test_the_stored_notebook_was_run_in_one_go_and_is_small() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    kinds = [kind for cell in code_cells(notebook) for kind in shown(cell)]
    assert "error" not in kinds and kinds.count("image/png") >= 8
    assert "site-packages" not in printed(code_cells(notebook))  # a warning that tells of the machine
