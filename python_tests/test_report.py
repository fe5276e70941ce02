"""The evaluation's report, from records of known numbers."""

from __future__ import annotations

import json
import re

import pytest
from tiny_records import in_blocks, made_up

from zo_kernels.robustness import html, plots
from zo_kernels.robustness.metrics import layer_rises
from zo_kernels.robustness.report import write_report

FIGURES = ("metric_vs_noise.png", "quantization.png", "layers.png", "loss_per_step.png")


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
    )
    assert sorted(p.name for p in target.iterdir()) == sorted(files)
    for name in FIGURES:
        data = files[name].read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 8_000
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
    again = write_report(target, made_up("a", 0.0), title="B", arms=["a"])
    assert not {"loss_per_step.png", "layers.png"} & set(again)
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
    with pytest.raises(ImportError, match=r"zo-kernels\[demo\]"):
        write_report(tmp_path, made_up("a", 0.0), title="t", arms=["a"])
    assert not list(tmp_path.iterdir())
