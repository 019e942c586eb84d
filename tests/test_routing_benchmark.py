"""The benchmark of the routing: its rebuilt routers are right, and its table tells of all of them."""

import importlib.util
import json
from itertools import groupby
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location(
    "routing_benchmark", Path(__file__).parent.parent / "benchmarks" / "routing.py"
)
routing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(routing)

MASKS = {layout: routing.Cell(1, 2, 24, layout, 50).visual_mask() for layout in routing.LAYOUTS}
MASKS |= {"text only": torch.zeros(2, 5, dtype=torch.bool), "pictures only": torch.ones(2, 5, dtype=torch.bool)}
MASKS |= {"picture first": torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 1, 1]]).bool()}
CANDIDATES = ("masks", "where", "gather", "spans")


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("name", CANDIDATES)
def test_every_router_answers_like_a_loop_over_the_tokens(name: str, mask: torch.Tensor) -> None:
    text, visual = (torch.nn.Linear(6, 4).double() for _ in range(2))
    hidden_states = torch.randn(*mask.shape, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*mask.shape, 4, dtype=torch.float64)
    leaves = [hidden_states, *text.parameters(), *visual.parameters()]

    router = routing.ROUTERS[name](mask)
    merged = router.merge(router.split(hidden_states), text, visual)
    gradients = torch.autograd.grad((merged * weights).sum(), leaves)

    rows = [
        (visual if is_visual else text)(token)
        for row, flags in zip(hidden_states, mask.tolist(), strict=True)
        for token, is_visual in zip(row, flags, strict=True)
    ]
    looped = torch.stack(rows).view_as(weights)
    expected = torch.autograd.grad((looped * weights).sum(), leaves, allow_unused=True)
    torch.testing.assert_close(merged, looped)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if wanted is None else wanted)


@pytest.mark.parametrize("name", [*CANDIDATES, "no routing"])
def test_a_measured_layer_with_equal_experts_is_the_dense_layer(name: str) -> None:
    pair = routing.Pair(routing.SMALL, 1, torch.float64)
    weights = pair.dense.state_dict()
    pair.mars.load_state_dict({key: weights[key.replace("visual_", "")] for key in pair.mars.state_dict()})
    inputs = pair.inputs(MASKS["interleaved"])
    expected = pair.forward("dense", MASKS["interleaved"], inputs)
    torch.testing.assert_close(pair.forward(name, MASKS["interleaved"], inputs), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_wrong_router_is_found_before_anything_is_measured(monkeypatch, layers: int) -> None:
    routing.check_agreement(MASKS["random"], layers)
    monkeypatch.setitem(routing.ROUTERS, "spans", lambda mask: routing.MaskRouter(~mask))
    with pytest.raises(AssertionError, match="`spans`"):
        routing.check_agreement(MASKS["random"], layers)


@pytest.mark.parametrize("share", [8, 50, 92])
@pytest.mark.parametrize("layout", routing.LAYOUTS)
def test_every_row_has_its_share_of_visual_tokens_where_the_layout_puts_them(layout: str, share: int) -> None:
    mask = routing.Cell(1, 3, 200, layout, share).visual_mask()
    assert mask.sum(1).tolist() == [2 * share] * 3
    runs = [[(kind, len(list(run))) for kind, run in groupby(row)] for row in mask.tolist()]
    if layout == "random":
        assert runs[0] != runs[1] != runs[2]
    else:
        kinds = [False, True] if layout == "text-to-image" else [False, True] * 4 + [False]
        assert [kind for kind, _ in runs[0]] == kinds
        for kind in (False, True):
            lengths = [length for found, length in runs[0] if found == kind]
            assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("layout", "share"), [("random", 0), ("text-to-image", 100), ("interleaved", 5)])
def test_a_share_that_leaves_no_room_is_refused_before_anything_is_measured(capsys, layout: str, share: int) -> None:
    with pytest.raises(ValueError, match=f"^{share} % of 40 tokens"):
        routing.main(["--tokens", "40", "--share", str(share), "--layout", layout])
    assert capsys.readouterr().out == ""


def test_the_table_names_all_systems_and_judges_the_default_in_every_cell(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(routing, "QWEN_05B", routing.SMALL)
    monkeypatch.setattr(routing, "SECONDS", 0)
    file = tmp_path / "routing.json"
    sizes = ["--tokens", "16", "--share", "50", "--layout", "random", "text-to-image", "--repeats", "2"]
    routing.main([*sizes, "--layers", "1", "2", "--dtype", "float32", "--json", str(file)])

    cells = capsys.readouterr().out.split("\n\n")[1:-1]
    assert [cell.partition(",")[0] for cell in cells] == ["one layer"] * 2 + ["trunk of 2 layers"] * 2
    for cell in cells:
        first, passes, *lines, bound = cell.splitlines()
        assert "text-to-image, 50 % visual" in first or "random, 50 % visual" in first
        assert [line[:15].strip() for line in lines] == [
            *("dense", "masks", "where", "gather (ours)", "spans", "no routing"),
        ]
        assert passes.split("+")[0].strip() == "forward"
        assert bound.startswith("gather at most 1.05 of dense forward: ")

    records = json.loads(file.read_text())["records"]
    assert len(records) == 4 * 3 * 6
    judged = [record["ratio"] for record in records if (record["system"], record["pass"]) == ("gather", "forward")]
    for cell, ratio in zip(cells, judged, strict=True):
        assert cell.strip().endswith(f"{'met' if ratio <= 1.05 else 'not met'} ({ratio:.3f})")
        assert ("not met" in cell) == (ratio > 1.05)
    for record in records:
        assert len(record["repeats_ms"]) == 2 and min(record["repeats_ms"]) > 0
        assert record["lowest_ratio"] <= record["ratio"] <= record["highest_ratio"]
        assert record["system"] != "dense" or record["ratio"] == 1
    assert not list(tmp_path.glob("*.partial"))
