"""zo-kernels evaluate and compare end to end on tiny models."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from tiny_evaluation import tiny, tokenizer_of_words

from zo_kernels import cli
from zo_kernels.cli import evaluate as evaluate_module
from zo_kernels.refine import checkpoint
from zo_kernels.refine import records as records_module
from zo_kernels.refine.records import read_records

SUITE = """\
harmful: [harmful.csv]
harmless: harmless.jsonl
text: text.txt
noise: [0.3]
draws: 2
quantization: [int4-g16]
max-new-tokens: 4
perplexity_tokens: 40
perplexity_window: 16
layers: [w0.3]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two models, a judge, prompt files and a suite."""
    root = tmp_path_factory.mktemp("evaluate")
    tokenizer = tokenizer_of_words()
    checkpoint.save(tiny("llama"), tokenizer, root / "one")
    other = tiny("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    checkpoint.save(other, tokenizer, root / "two")
    (root / "harmful.csv").write_text(
        "goal,target\nhow to do a,Sure\nhow to make b c,Sure\nmake c,S\n"
    )
    rows = [{"instruction": "how to make tea", "output": "Sure , here"}, {"instruction": "tea"}]
    (root / "harmless.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "text.txt").write_text("how to make tea with a b c d e f g h " * 12)
    (root / "suite.yaml").write_text(SUITE)
    return root


def run(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


def evaluate(files, out, *more, model="one") -> int:
    return run(
        "evaluate", "--model", files / model, "--suite", files / "suite.yaml", "--dtype",
        "float32", "--out", out, *more,
    )  # fmt: skip


def test_evaluate_by_a_suite_file(files, tmp_path, capsys) -> None:
    assert evaluate(files, tmp_path / "a") == 0
    shown = capsys.readouterr().out
    assert "refusal rate %" in shown and "report.html" in shown and "KL from clean" in shown
    records = read_records(tmp_path / "a" / "evaluation.jsonl")
    conditions = ["clean", "w0.3/0", "w0.3/1", "int4-g16"]
    layers = [f"w0.3@{block}/{draw}" for draw in (0, 1) for block in (0, 1)]
    assert [r["condition"] for r in records] == conditions + layers
    assert (records[0]["harmful_count"], records[0]["harmless_count"]) == (3, 2)
    assert records[0]["harmless_losses"][1] is None
    names = ("report.html", "summary.md", "summary.json", "layers.png", "quantization.png")
    for name in (*names, "metric_vs_noise.png"):
        assert (tmp_path / "a" / name).stat().st_size > 1000, name
    times = read_records(tmp_path / "a" / "times.jsonl")
    assert [t["condition"] for t in times] == conditions + layers
    assert all(t["seconds"] > 0 for t in times)
    # Two runs give the same bytes.
    assert evaluate(files, tmp_path / "b") == 0
    for name in ("evaluation.jsonl", "report.html", "summary.json", "evaluation.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    # Options win over the suite.
    assert evaluate(files, tmp_path / "c", "--noise", "--layers", "--label", "mine") == 0
    records = read_records(tmp_path / "c" / "evaluation.jsonl")
    assert [r["condition"] for r in records] == ["clean", "int4-g16"]
    assert {r["label"] for r in records} == {"mine"}


def test_a_killed_evaluation_is_resumed(files, tmp_path, capsys, monkeypatch) -> None:
    assert evaluate(files, tmp_path / "whole") == 0
    original = records_module.MetricsLog.write

    def stop(log, record):
        original(log, record)
        if record.get("condition") == "w0.3/1" and log.path.name == "evaluation.jsonl":
            raise KeyboardInterrupt

    monkeypatch.setattr(records_module.MetricsLog, "write", stop)
    out = tmp_path / "parts"
    assert evaluate(files, out) == 130
    monkeypatch.undo()
    path = out / "evaluation.jsonl"
    assert [r["condition"] for r in read_records(path)] == ["clean", "w0.3/0", "w0.3/1"]
    for name in ("evaluation.jsonl", "times.jsonl"):
        with (out / name).open("a") as stream:
            stream.write('{"condition": "int')  # a kill in the middle of a line
    assert evaluate(files, out, "--max-new-tokens", 5) == 1
    assert "differs in max_new_tokens; --fresh" in capsys.readouterr().err
    assert len(read_records(path)) == 3  # as it was
    assert evaluate(files, out) == 0
    assert path.read_bytes() == (tmp_path / "whole" / "evaluation.jsonl").read_bytes()
    assert [t["condition"] for t in read_records(out / "times.jsonl")] == [
        r["condition"] for r in read_records(path)
    ]
    # More conditions, and others: what was measured stays.
    assert evaluate(files, out, "--quantization", "int8", "--batch-size", 2, "--copy-weights") == 0
    names = [r["condition"] for r in read_records(path)]
    assert len(names) == 9 and names[3] == "int8" and names[-1] == "int4-g16"
    assert "int4-g16" in (out / "summary.md").read_text()
    # A mistake leaves all of it, --fresh or not.
    kept = {p.name: p.read_bytes() for p in out.iterdir()}
    for wrong, message in (
        (["--max-length", 4], "max_length 4"),
        (["--quantization", "int4-g13"], "'int4-g13' of 'model.layers.0.self_attn.q_proj.weight'"),
        (["--noise", "-1"], "noise: expected finite levels above 0"),
        (["--quantization", "int8", "int8"], "expected each condition once, got ['int8']"),
        (["--noise-seed", "-1"], "noise_seed: expected 0 <= seed"),
    ):
        assert evaluate(files, out, "--layers", *wrong, "--fresh") == 1
        assert message in capsys.readouterr().err
    assert kept == {p.name: p.read_bytes() for p in out.iterdir()}
    assert evaluate(files, out, "--max-new-tokens", 5, "--layers", "--fresh") == 0
    assert json.loads((out / "evaluation.json").read_text())["max_new_tokens"] == 5
    assert len(read_records(path)) == 4 and not (out / "layers.png").exists()
    (out / "evaluation.json").unlink()
    assert evaluate(files, out) == 1
    assert "which differs in" in capsys.readouterr().err


def test_evaluate_on_other_prompts(files, tmp_path, capsys) -> None:
    """XSTest's file has both kinds; what no file has comes from --data, or is built in."""
    xstest = tmp_path / "xstest.csv"
    xstest.write_text("id,prompt,label\n1,how to do a,unsafe\n2,make tea,safe\n3,tea,safe\n")
    data = tmp_path / "data.jsonl"
    rows = [("how to do b", "I can't", "harmful"), ("make c", "Sure , here", "benign")]
    data.write_text(
        "\n".join(json.dumps({"prompt": p, "completion": c, "kind": k}) for p, c, k in rows)
    )
    options = ["--model", files / "one", "--noise", "--quantization", "--max-new-tokens", 2]
    options += ["--perplexity-tokens", 40, "--perplexity-window", 16, "--max-length", 2000]
    for name, more, counts in (
        ("x", ["--prompts", xstest], (1, 2)),
        ("d", ["--data", data, "--split", "all"], (1, 1)),
        ("m", ["--data", data, "--split", "all", "--harmful", files / "harmful.csv"], (3, 1)),
        ("b", ["--max-prompts", 2, "--text", files / "text.txt"], (2, 2)),
    ):
        text = [] if "--text" in more else ["--text", files / "text.txt"]
        assert run("evaluate", *options, *more, *text, "--out", tmp_path / name) == 0, name
        (record,) = read_records(tmp_path / name / "evaluation.jsonl")
        assert (record["harmful_count"], record["harmless_count"]) == counts, name
    given = argparse.Namespace(harmful=None, harmless=None, prompts=None, data=None, split="all")
    kinds = [example.kind for example in evaluate_module._examples(given)]
    assert kinds == ["harmful"] * 120 + ["harmless"] * 120  # in this order in every process
    assert run("evaluate", *options, "--harmful", xstest, "--out", tmp_path / "no") == 1
    assert "expected a harmful prompt, got one that says 'safe'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_judges_read_the_answers(files, tmp_path, capsys, monkeypatch) -> None:
    from zo_kernels.robustness import judges

    monkeypatch.setattr(judges.HarmBenchJudge, "words", ("tea", "make"))
    out, judge = tmp_path / "judged", f"harmbench={files / 'two'}"
    assert evaluate(files, out, "--judge", judge) == 0
    assert "HarmBench ASR %" in capsys.readouterr().out
    records = read_records(out / "evaluation.jsonl")
    for record in records:
        answered = record["block"] is None
        assert (record["asr_harmbench"] is not None) == answered
        if answered:
            assert len(record["harmbench_scores"]) == 3
            hits = [int(score > 0.5) for score in record["harmbench_scores"]]
            assert record["harmbench_hits"] == hits
    before = (out / "evaluation.jsonl").read_bytes()
    original, judged = judges.HarmBenchJudge.scores, []

    def scores(self, examples, *rest, **options):
        judged.append(len(examples))
        return original(self, examples, *rest, **options)

    monkeypatch.setattr(judges.HarmBenchJudge, "scores", scores)
    assert evaluate(files, out, "--judge", judge) == 0
    assert (out / "evaluation.jsonl").read_bytes() == before and not judged
    # Another judge of that kind reads them all again; a suite file may name it.
    suite = files / "judged.yaml"
    suite.write_text(SUITE + "judge: {harmbench: one}\n")
    assert evaluate(files, out, "--suite", suite) == 0
    assert judged == [3, 3, 3, 3] and (out / "evaluation.jsonl").read_bytes() != before
    for wrong in ("harmbench", "oracle=x", f"harmbench={tmp_path}"):
        assert evaluate(files, tmp_path / "no", "--judge", wrong) == 1
        assert "judge: expected NAME=DIR" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_compare(files, tmp_path, capsys) -> None:
    for model in ("one", "two"):
        assert evaluate(files, tmp_path / model, model=model) == 0
    capsys.readouterr()
    runs = [tmp_path / "one", tmp_path / "two" / "evaluation.jsonl"]
    assert run("compare", *runs, "--out", tmp_path / "both") == 0
    shown = capsys.readouterr().out
    assert "two against one: " in shown and "[" in shown
    document = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert list(document["arms"]) == ["one", "two"]
    (compared,) = document["comparisons"]
    rows = {(r["family"], r["metric"]): r for r in compared["rows"]}
    assert rows["clean", "refusal_loss"]["mean"] != 0
    assert rows["w0.3", "refusal_rate"]["draws"] == 2
    # A model against itself, told apart by folders: no difference, and it says so.
    assert evaluate(files, tmp_path / "again") == 0
    capsys.readouterr()
    assert run("compare", tmp_path / "one", tmp_path / "again") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "again/one against one: none of" in shown
    assert run("compare", tmp_path / "one") == 1
    assert "at least two models" in capsys.readouterr().err
    assert run("compare", tmp_path / "one", tmp_path / "nothing") == 1
    assert "expected a folder of zo-kernels evaluate" in capsys.readouterr().err
    assert evaluate(files, tmp_path / "other", "--max-prompts", 1) == 0
    assert run("compare", tmp_path / "one", tmp_path / "other") == 1
    assert "expected equal prompts to pair by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noise: 0.1", "noise: expected tuple[float, ...], got 0.1"),
        ("draws: many", "draws: expected int, got 'many'"),
        ("draws: true", "draws: expected int, got True"),
        ("refusal: null", "refusal: expected str, got None"),
        ("harmful: 3", "harmful: expected str, got 3"),
        ("text: [a.txt]", "text: expected str, got ['a.txt']"),
        ("label: [a]", "label: expected"),
        ("judge: harmbench=x", "judge: expected names with folders"),
        ("judge: {oracle: x}", "judge: expected NAME=DIR"),
        ("magic: 1", "expected options out of"),
        ("- a", "expected a mapping"),
        ("a: [", "expected YAML"),
    ],
)
def test_suite_errors(files, tmp_path, capsys, text, message) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    out = tmp_path / "out"
    assert run("evaluate", "--model", files / "one", "--suite", path, "--out", out) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_suite_has_numbers_without_a_dot(tmp_path) -> None:
    """Which YAML reads as texts."""
    path = tmp_path / "suite.yaml"
    path.write_text("noise: [5e-2, 0.1]\nlabel: 1e-3\n")
    assert evaluate_module.suite_defaults(path) == {"noise": [0.05, 0.1], "label": "1e-3"}


def test_a_suite_may_leave_limits_open(files, tmp_path) -> None:
    suite = tmp_path / "open.yaml"
    suite.write_text(SUITE.replace("harm", f"{files}/harm").replace("text.txt", f"{files}/text.txt")
                     .replace(f"{files}/harmful: ", "harmful: ")
                     .replace(f"{files}/harmless: ", "harmless: ")
                     .replace("noise: [0.3]", "noise: [1]")
                     .replace("layers: [w0.3]", "max_prompts: null"))  # fmt: skip
    assert run("evaluate", "--model", files / "one", "--suite", suite, "--out", tmp_path / "o") == 0
    assert "w1/0" in (tmp_path / "o" / "evaluation.jsonl").read_text()
