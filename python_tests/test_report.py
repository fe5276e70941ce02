"""The evaluation's report, from records of known numbers."""

from __future__ import annotations

import json
import re

import pytest
from tiny_records import in_blocks, made_up

from zo_kernels.robustness import html, plots
from zo_kernels.robustness.comparison import compare_records
from zo_kernels.robustness.metrics import layer_rises
from zo_kernels.robustness.plots import canvas
from zo_kernels.robustness.report import write_report

FIGURES = (
    *("differences.png", "metric_vs_noise.png", "quantization.png", "layers.png", "scores.png"),
    "loss_per_step.png",
)
SCORES = {
    "blocks": [
        {"block": f"model.layers.{i}", "number": i, "noise": 0.02 * i, "noise_se": 0.01}
        | {"quant": 0.001, "score": 0.5 * i, "score_se": 0.125, "slope": -1.0, "slope_se": None}
        | {"selected": i == 2}
        for i in (2, 0, 1)
    ],
    "settings": {"rho": 1e-3, "relative": True, "draws": 4, "quantization": "int4-g128"}
    | {"estimator": "antithetic", "prompts": 64, "settled": False},
}
COSTS = [
    {"stage": "alignment", "steps": 100, "seconds": 800.0, "forwards": 2400.0}
    | {"peak_bytes": 3 << 30, "model_bytes": 1 << 30, "first_order": True},
    {"stage": "refinement", "arm": "Aligned + ZO", "steps": 10, "seconds": 100.0}
    | {"forwards": 160.0, "peak_bytes": 256 << 20, "model_bytes": 1 << 30},
    {"stage": "refinement", "arm": "Other", "steps": 10, "seconds": 100.0, "forwards": None}
    | {"peak_bytes": None},
]


def is_figure(data: bytes) -> bool:
    return data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 8_000


def test_report(tmp_path) -> None:
    records = made_up("base", 0.3) + made_up("aligned", 0.0) + made_up("refined", -0.2)
    records[-1]["refusal_loss"], records[-1]["non_finite"] = None, ["refusal_loss"]
    records += in_blocks("aligned", [0.5, -0.1])
    logs = {"alignment": [{"step": i, "loss": 2.0 / (i + 1)} for i in range(30)]}
    logs["refinement"] = [{"step": i, "loss": None if i == 3 else 0.5} for i in range(8)]
    target = tmp_path / "new" / "report"
    files = write_report(
        target,
        records,
        title="A title",
        arms={"base": "Base", "aligned": "Aligned", "refined": "Aligned + ZO"},
        training_logs=logs,
        notes=("A note.",),
        costs=COSTS,
        scores=SCORES,
    )
    assert sorted(p.name for p in target.iterdir()) == sorted(files)
    assert all(is_figure(files[name].read_bytes()) for name in FIGURES)
    document = json.loads(files["summary.json"].read_text())
    assert document["summary"]["aligned"]["w0.1"]["refusal_loss"]["mean"] == pytest.approx(2.1)
    pairs = [(c["reference"], c["other"]) for c in document["comparisons"]]
    assert pairs == [("aligned", "refined")]
    assert document["layers"] == {"aligned w0.1": pytest.approx([0.5, -0.1])}
    lines = files["summary.md"].read_text().splitlines()
    assert lines[0] == "# A title" and "A note." in lines
    assert "|  | Base | Aligned | Aligned + ZO |" in lines
    start = lines.index("## Loss on refusals of harmful prompts (nats per token)")
    cells = dict(re.match(r"\| (\S+) \| (.*) \|", line).groups() for line in lines[start + 4 :][:6])
    clean = "1.300 [1.200, 1.400] | 1.000 [0.900, 1.100] | 0.800 [0.700, 0.900]"
    assert cells["clean"] == clean
    assert cells["int4"].endswith("not finite in 1 of 1")
    assert any(line.startswith("Aligned + ZO against Aligned: ") for line in lines)
    assert "| w0.1 | refusal loss | -0.220 [" in "\n".join(lines)
    assert document["costs"]["stages"][1]["time_share"] == 0.125
    assert document["costs"]["stages"][1]["extra_share"] == pytest.approx(1 / 12)
    assert document["costs"]["stages"][1]["memory_share"] == pytest.approx(1.25 / 4)
    assert document["costs"]["stages"][2]["memory_share"] is None
    assert document["costs"]["published"]["memory_share"] == 0.32
    assert document["scores"] == SCORES
    page = files["report.html"].read_text()
    for section in ("What each stage cost", "Layer scores"):
        assert f"## {section}" in lines and f"<h2>{section}</h2>" in page
    row = "| Aligned + ZO: refinement | 10 | 100.0 | 160.0 | 256.0 | 12.5 % | 0.08x | 0.31x |"
    assert row in lines
    assert "| Other: refinement | 10 | 100.0 | n/a | n/a | 12.5 % | n/a | n/a |" in lines
    published = "| zeroth order as published (arXiv 2605.29396, Table 3) | 10 | 152.1 |"
    assert published + " n/a | n/a | 13.3 % | n/a | 0.32x |" in lines
    start = lines.index("| 0 (model.layers.0) | +0 ± 0.01 | +0.001 | +0 ± 0.12 | -1 | no |")
    assert lines[start + 2].startswith("| 2 (model.layers.2) | +0.04 ± 0.01 |")  # by number
    assert lines[start + 2].endswith("| yes |") and '<tr class="yes"><td>2 (model' in page
    assert any("4 draws a block), and quantised to int4-g128." in line for line in lines)
    assert any(line.startswith("The selection is not settled") for line in lines)
    again = write_report(target, made_up("a", 0.0), title="B", arms=["a"])
    assert not set(FIGURES) - {"metric_vs_noise.png", "quantization.png"} & set(again)
    assert sorted(p.name for p in target.iterdir()) == sorted(again)  # nor left over
    assert files["summary.md"].read_text().startswith("# B\n")
    one_arm = files["summary.md"].read_text().splitlines()
    assert "|  | a |" in one_arm  # the conditions, of which there are more, go down the page


def test_html_needs_no_other_file_and_runs_no_answer(tmp_path) -> None:
    records = made_up("base", 0.0) + made_up("new", -0.1)
    for record in records:
        record |= {"harmbench_scores": [0.25, 0.75, None], "harmbench_hits": [0, 1, None]}
        record |= {"asr_harmbench": None, "non_finite": ["asr_harmbench"]}
    page = write_report(tmp_path, records, title="A <title>", arms=["base", "new"])["report.html"]
    text = page.read_text()
    assert "<h1>A &lt;title&gt;</h1>" in text
    assert text.count("data:image/png;base64,") == 3
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "<script" not in text
    assert "HarmBench 0.75" in text and '<span class="mark refused">refused</span>' in text
    assert "new against base: " in text and "not finite in 1 of 1" in text


def test_report_of_several_training_seeds(tmp_path) -> None:
    """Seeds count once in each table, are told of, and show one model's answers."""
    records = made_up("aligned", 0.0)
    for seed, shift in ((1, -0.1), (0, -0.2), (2, -0.3)):
        records += made_up("zo", shift, training_seed=seed)
        records += made_up("walk", -shift, training_seed=seed)
    records += [r | {"training_seed": 1} for r in in_blocks("zo", [0.5, 0.25])]
    arms = {"aligned": "Aligned", "zo": "ZO", "walk": "Walk"}
    pairs = [("aligned", "zo"), ("aligned", "walk"), ("walk", "zo")]
    files = write_report(tmp_path, records, title="t", arms=arms, compare=pairs)
    assert is_figure(files["differences.png"].read_bytes())
    text = files["summary.md"].read_text()
    assert "Trained with several seeds: ZO (3); Walk (3)." in text
    assert "4.7 % of pure chance came out significant" in text
    assert "One model each: Aligned." in text
    assert "## ZO against Walk" in text and "| int8 | refusal loss | -0.400 [" in text
    document = json.loads(files["summary.json"].read_text())
    cell = document["summary"]["zo"]["int8"]["refusal_loss"]
    assert (cell["training_seeds"], cell["n"]) == (3, 3) and cell["mean"] == pytest.approx(0.8)
    # Rises are over the seed's own clean losses, 0.9, 0.8 and 0.7 (its block's start at 1.0).
    assert document["layers"]["zo w0.1"] == pytest.approx([0.6, 0.35])
    shown = html.answers(records, arms, "harmful")[0]["answers"]
    assert [card["condition"] for card in shown] == 3 * [
        *("clean", "w0.05", "w0.1", "a0.02", "int8", "int4"),
    ]


def test_one_training_seed_reads_as_none(tmp_path) -> None:
    """Records without the field, with None and with one seed leave the same pages."""
    pages = []
    for changes in ({}, {"training_seed": None}, {"training_seed": 7}):
        records = made_up("a", 0.0, **changes) + made_up("b", -0.1, **changes)
        files = write_report(tmp_path, records, title="t", arms=["a", "b"])
        pages.append([path.read_bytes() for path in files.values()])
    assert pages[0] == pages[1] == pages[2]


def test_figures_of_many_arms() -> None:
    """Ten arms, one of them broken, one without a finite number: every arm has its own look."""
    arms = {f"arm {i}": f"a rather long name of arm number {i}" for i in range(10)}
    records = [r for i, arm in enumerate(arms) for r in made_up(arm, 0.05 * i)]
    for record in records:
        if record["label"] == "arm 9":
            record["refusal_losses"] = [9.0, 9.1, 9.2]
            record["refusal_loss"] = 9.1
    records[-1] |= {"refusal_loss": None, "non_finite": ["refusal_loss"]}
    looks = [tuple(canvas.arm_style(i).values()) for i in range(10)]
    assert len(set(looks)) == 10
    assert len({tuple(canvas.arm_fill(i).values()) for i in range(10)}) == 10
    assert is_figure(plots.metric_vs_noise(records, arms))
    assert is_figure(plots.quantized_bars(records, arms))
    chosen = {arm: [r for r in records if r["label"] == arm] for arm in arms}
    rows = [compare_records(chosen["arm 0"], chosen[arm]) for arm in list(arms)[1:]]
    assert is_figure(plots.differences(rows, arms))
    assert plots.differences([], arms) is None


@pytest.mark.parametrize("blocks", [1, 5, 32])
def test_figure_of_layer_scores(blocks: int) -> None:
    rows = [SCORES["blocks"][0] | {"number": i, "selected": i % 4 == 1} for i in range(blocks)]
    rows[-1] = rows[-1] | {"noise": None, "noise_se": None, "score": None}
    assert is_figure(plots.layer_scores(rows, SCORES["settings"]))
    without = [row | {"quant": None} for row in rows]
    settings = SCORES["settings"] | {"quantization": None, "relative": False, "settled": None}
    assert plots.layer_scores(without, settings) != plots.layer_scores(rows, settings)


def test_errors_of_scores_and_costs(tmp_path) -> None:
    def report(**parts) -> None:
        write_report(tmp_path, made_up("a", 0.0), title="t", arms=["a"], **parts)

    blocks, settings = SCORES["blocks"], SCORES["settings"]
    short = [{k: v for k, v in blocks[0].items() if k != "quant"}]
    for scores, message in (
        ({"blocks": [], "settings": settings}, "a row for each decoder block, got none"),
        ({"blocks": short, "settings": settings}, r"row 0: expected .* got no \['quant'\]"),
        ({"blocks": blocks, "settings": {"rho": 1.0}}, "settings: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            report(scores=scores)
    for costs, message in (
        ([], "a row for each stage, got none"),
        ([{"stage": "x"}], r"row 0: expected .* got no \['steps'"),
        ([COSTS[0] | {"minutes": 3}], r"also \['minutes'\]"),
        ([COSTS[0], COSTS[0]], "one first-order stage, got"),
    ):
        with pytest.raises(ValueError, match=message):
            report(costs=costs)
    assert not list(tmp_path.iterdir())
    report(costs=COSTS[1:])
    assert "No stage is marked as the first-order one" in (tmp_path / "summary.md").read_text()


def test_answers_that_change_come_first() -> None:
    records = made_up("a", 0.0)
    for record in records[1:]:
        record["refused"] = [1, 1, 0]
        record["degenerate"] = ["repetitive", None, "empty"]
    shown = html.answers(records, {"a": "A"}, "harmful")
    assert [e["prompt"] for e in shown] == ["Do harm", "Do <b>worse</b>", "Lie"]
    first = shown[0]["answers"]
    assert [c["condition"] for c in first] == ["clean", "w0.05", "w0.1", "a0.02", "int8", "int4"]
    assert [c["marks"] for c in first[:2]] == [["refused"], ["repetitive"]]
    assert len(html.answers(records, {"a": "A"}, "harmless", most=1)) == 1
    for record in records:
        record["harmful_answers"] = None
    assert html.answers(records, {"a": "A"}, "harmful") == []


def test_figures_without_data() -> None:
    clean = made_up("a", 0.0)[:1]
    assert plots.metric_vs_noise(clean, {"a": "A"}) is None
    assert plots.quantized_bars(clean, {"a": "A"}) is None
    assert plots.layer_map(clean, {"a": "A"}) is None


@pytest.mark.parametrize("arms", [2, 10])  # side by side, and below each other
def test_figures_have_no_panel_of_what_was_not_measured(arms, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr("zo_kernels.robustness.plots.conditions.png", drawn.append)
    names = {f"arm {i}": f"Arm {i}" for i in range(arms)}
    records = [r | {"refusal_rate": None} for name in names for r in made_up(name, 0.0)]
    plots.metric_vs_noise(records, names)
    plots.quantized_bars(records, names)
    for figure in drawn:
        assert {axis.get_title() for axis in figure.axes} == {"Refusal loss", "Perplexity"}
    assert len(drawn) == 2
    nothing = [r | dict.fromkeys(("refusal_loss", "perplexity")) for r in records]
    assert plots.quantized_bars(nothing, names) is None


def test_layer_rises_mark_what_is_missing() -> None:
    records = made_up("a", 0.0)[:1] + in_blocks("a", [0.5, 0.25])
    records[1]["refusal_losses"][0] = None
    rises = layer_rises(records)["a", "w0.1"]
    assert rises[0] != rises[0] and rises[1] == pytest.approx(0.25)
    # Models of different depths, one of them without its clean record.
    records += made_up("b", 0.0)[:1] + in_blocks("b", [0.1, 0.2, 0.3]) + in_blocks("c", [0.1])
    found = layer_rises(records)
    assert list(found) == [("a", "w0.1"), ("b", "w0.1")]
    assert len(found["a", "w0.1"]) == 3 and found["a", "w0.1"][2] != found["a", "w0.1"][2]
    assert plots.layer_map(records, {"a": "A", "b": "B", "c": "C"}) is not None


def test_report_errors(tmp_path, monkeypatch) -> None:
    records = made_up("a", 0.0) + made_up("b", 0.1)
    with pytest.raises(ValueError, match="exactly the arms"):
        write_report(tmp_path, records, title="t", arms=["a"])
    with pytest.raises(ValueError, match="comparisons among"):
        write_report(tmp_path, records, title="t", arms=["a", "b"], compare=[("a", "c")])
    records[-1]["refusal_list"] = "advbench-29"
    with pytest.raises(ValueError, match="one refusal_list"):
        write_report(tmp_path, records, title="t", arms=["a", "b"])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"zo-kernels\[refine\]"):
        write_report(tmp_path, made_up("a", 0.0), title="t", arms=["a"])
    assert not list(tmp_path.iterdir())
