"""The evaluation's summary, paired differences and report, from records of known numbers."""

from __future__ import annotations

import json
import math

import pytest

from zo_kernels.robustness import report as report_module
from zo_kernels.robustness.report import write_report
from zo_kernels.robustness.suite import default_conditions, paired, summary


def made_up(label: str, shift: float, **changes) -> list[dict]:
    """Records with known numbers: draws 0, 1, 2 have refusal losses base + 0, 0.1, 0.2."""
    records = []
    for condition in default_conditions(noise=(0.05, 0.1)):
        loss = 1.0 + 10 * condition.level * (condition.kind == "weight_noise") + shift
        loss += 0.1 * (condition.draw or 0) * (1.0 + shift)
        records.append(
            {
                "label": label,
                "condition": condition.name,
                "family": condition.family,
                "kind": condition.kind,
                "level": condition.level,
                "draw": condition.draw,
                "noise_seed": 0,
                "noise_kind": "rel_std",
                "noise_on": "linear",
                "refusal_list": "prefix-1",
                "harmful_count": 10,
                "harmless_count": 8,
                "refusal_loss": loss,
                "harmless_loss": 2.0,
                "refusal_rate": 0.5,
                "over_refusal_rate": 0.125,
                "perplexity": 20.0 + 4 * (condition.draw or 0),
                "non_finite": [],
            }
            | changes
        )
    return records


def test_paired_and_summary() -> None:
    a, b = made_up("aligned", 0.0), made_up("refined", -0.2)
    got = paired(a, reversed(b), "refusal_loss", 0.1)
    # Differences -0.2, -0.22, -0.24: mean -0.22, std 0.02.
    assert got["n"] == 3
    assert got["differences"] == pytest.approx([-0.2, -0.22, -0.24])
    assert got["mean"] == pytest.approx(-0.22)
    assert got["standard_error"] == pytest.approx(0.02 / math.sqrt(3))
    table = summary([*a, *b])
    assert list(table) == ["aligned", "refined"]
    assert list(table["aligned"]) == ["clean", "w0.05", "w0.1", "int8", "int4"]
    cell = table["aligned"]["w0.05"]["perplexity"]
    assert (cell["mean"], cell["std"], cell["n"]) == (24.0, 4.0, 3)
    assert table["refined"]["int4"]["refusal_loss"]["mean"] == pytest.approx(0.8)
    assert table["refined"]["int4"]["refusal_loss"]["std"] is None
    with pytest.raises(ValueError, match="same noise draws"):
        paired(a, [r for r in b if r["draw"] != 1], "refusal_loss", 0.1)
    with pytest.raises(ValueError, match="same noise draws"):
        paired(a, b, "refusal_loss", 0.7)
    with pytest.raises(ValueError, match="noise_seed"):
        paired(a, made_up("refined", 0.0, noise_seed=1), "refusal_loss", 0.1)
    with pytest.raises(ValueError, match="repeats"):
        paired(a, b + b, "refusal_loss", 0.1)
    b[2]["refusal_loss"], b[2]["non_finite"] = None, ["refusal_loss"]
    assert paired(a, b, "refusal_loss", 0.05)["mean"] is None
    cell = summary(b)["refined"]["w0.05"]["refusal_loss"]
    assert cell == {"mean": None, "std": None, "n": 3, "missing": 1, "non_finite": 1}


def test_report(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    records = made_up("base", 0.3) + made_up("aligned", 0.0) + made_up("refined", -0.2)
    records[-1]["refusal_loss"], records[-1]["non_finite"] = None, ["refusal_loss"]
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
    for name in ("metric_vs_noise.png", "loss_per_step.png"):
        data = files[name].read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000
    document = json.loads(files["summary.json"].read_text())
    assert document["summary"]["aligned"]["w0.1"]["refusal_loss"]["mean"] == pytest.approx(2.1)
    assert {(row["reference"], row["other"]) for row in document["paired"]} == {
        ("aligned", "refined")
    }
    page = files["summary.md"].read_text()
    lines = page.splitlines()
    assert lines[0] == "# A title" and "A note." in lines
    plus = "\N{PLUS-MINUS SIGN}"
    row = f"| Aligned | 1.000 | 1.600 {plus} 0.100 | 2.100 {plus} 0.100 | 1.000 | 1.000 |"
    assert row in lines
    assert (
        f"| Aligned + ZO | 0.800 | 1.380 {plus} 0.080 | 1.880 {plus} 0.080 | 0.800 "
        "| not finite in 1 of 1 |"
    ) in lines
    assert "| 0.1 | refusal_loss | -0.2200 | 0.0115 | 3 |" in lines
    assert (
        f"- Noise 0.1, refusal loss: difference -0.2200 {plus} 0.0115 (s.e.): |d| is more than "
        "2 s.e., so these draws show a difference."
    ) in lines
    assert any("refusal rate: difference +0.0000 in every draw" in line for line in lines)
    assert "about 82 %" in page
    assert "significan" not in page
    assert "| arm | clean\N{DAGGER} | w0.05 | w0.1 | int8\N{DAGGER} | int4\N{DAGGER} |" in lines
    assert "no error bar" in page
    again = write_report(target, records, title="B", arms=["base", "aligned", "refined"])
    assert "loss_per_step.png" not in again
    assert files["summary.md"].read_text().startswith("# B\n")


def test_report_sentences() -> None:
    row = {"level": 0.1, "metric": "refusal_loss", "mean": 0.1, "standard_error": 0.06, "n": 3}
    assert "|d| is not more than 2 s.e." in report_module._sentence(row)
    assert "single draw" in report_module._sentence(row | {"standard_error": None, "n": 1})
    assert report_module._coverage(2.0, 2) == pytest.approx(2 / math.sqrt(6), abs=1e-6)
    assert report_module._coverage(1.0, 1) == pytest.approx(0.5, abs=1e-6)


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
