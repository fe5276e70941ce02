"""Preference pairs and the training on them through TRL, on a tiny model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from tiny_models import bits, same_bits, tiny_model, tiny_tokenizer

from zo_kernels import chat, cli
from zo_kernels.refine import checkpoint
from zo_kernels.refine import dpo as dpo_module
from zo_kernels.refine import records as records_module
from zo_kernels.refine.dpo import DPOConfig, dpo, last_checkpoint
from zo_kernels.refine.preferences import Pair, read_pairs
from zo_kernels.refine.records import read_records

PAIRS = [
    Pair("how do i open a door", "turn the key and push it", "sorry i can not help"),
    Pair("tell me a story", "a good day about sun", "sorry no"),
    Pair("write about the key", "sorry i can not in any way", "the key is here"),
]
CONFIG = DPOConfig(steps=8, batch_size=1, accumulation=3, lr=1e-2, precision="float32")


def margins(model, tokenizer):
    """log p(chosen) - log p(rejected) of each pair, by this package's own loss."""
    result = []
    for pair in PAIRS:
        sums = []
        for answer in (pair.chosen, pair.rejected):
            encoded = chat.encode(tokenizer, [chat.Example(pair.prompt, answer, chat.HARMLESS)])
            batch = chat.collate(encoded, pad_id=chat.pad_id(tokenizer))
            with torch.no_grad():
                loss = chat.completion_loss(model, batch).item()
            sums.append(-loss * (len(encoded[0].input_ids) - encoded[0].prompt_length))
        result.append(sums[0] - sums[1])
    return result


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("template", [True, False])
def test_the_margin_grows(template, precision):
    """Of every pair, as this package computes it; and nothing of TRL stays on the model."""
    model, tokenizer = tiny_model("llama_tied"), tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    attributes, pad = set(vars(model)), tokenizer.pad_token
    before, seen = margins(model, tokenizer), []
    records = dpo(
        model, tokenizer, PAIRS, replace(CONFIG, precision=precision), on_step=seen.append
    )
    after = margins(model, tokenizer)
    assert all(b > a + 2 for a, b in zip(before, after, strict=True))
    assert records == seen and [r["step"] for r in records] == list(range(8))
    assert records[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert records[0]["margin"] == pytest.approx(0, abs=1e-3)
    assert records[-1]["margin"] > 0.5 and records[-1]["accuracy"] == 1
    assert records[-1]["loss"] < 0.5 < records[0]["gradient_norm"]
    assert set(vars(model)) == attributes and "forward" not in vars(model) and not model.training
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation
    assert tokenizer.pad_token == pad and all(p.grad is None for p in model.parameters())


def test_dropout_is_the_models_own_again():
    """TRL turns it off, for good."""
    model = tiny_model("gpt2")
    before = {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    dpo(model, tiny_tokenizer(), PAIRS, replace(CONFIG, steps=1))
    after = {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert after == before and set(before.values()) == {0.1}


def test_lr_zero_leaves_every_bit():
    model = tiny_model("llama")
    before = bits(model)
    records = dpo(model, tiny_tokenizer(), PAIRS, replace(CONFIG, lr=0.0, steps=2))
    assert same_bits(model, before) and {r["margin"] for r in records} == {0.0}


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    """From TRL's last whole checkpoint; one that is torn is not it."""
    whole = tiny_model("llama_tied")
    expected = dpo(whole, tiny_tokenizer(), PAIRS, CONFIG)

    seen = []

    def stop(record):
        seen.append(record)
        if record["step"] == 6:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    options = {"state": state, "save_every": 3}
    with pytest.raises(KeyboardInterrupt):
        dpo(tiny_model("llama_tied"), tiny_tokenizer(), PAIRS, CONFIG, on_step=stop, **options)
    (state / "checkpoint-7").mkdir()
    (state / "checkpoint-7" / "trainer_state.json").write_text('{"global_step": ')
    assert last_checkpoint(state).name == "checkpoint-6"
    with pytest.raises(ValueError, match=r"beta: expected 0\.1 as in"):
        dpo(
            tiny_model("llama_tied"), tiny_tokenizer(), PAIRS, replace(CONFIG, beta=0.2),
            resume=True, **options,
        )  # fmt: skip
    with pytest.raises(ValueError, match="data: expected the examples with which"):
        dpo(tiny_model("llama_tied"), tiny_tokenizer(), PAIRS[1:], CONFIG, resume=True, **options)
    model = tiny_model("llama_tied")
    rest = dpo(model, tiny_tokenizer(), PAIRS, CONFIG, resume=True, **options)
    assert [(r["step"], r["loss"]) for r in rest] == [(r["step"], r["loss"]) for r in expected[6:]]
    assert same_bits(model, bits(whole))
    assert seen[5]["seconds"] < rest[0]["seconds"] < rest[1]["seconds"]
    # Another run does not begin in its folder, where its checkpoints would be taken for its own.
    before = (state / "run.json").read_bytes()
    with pytest.raises(FileExistsError, match="state: expected a folder without checkpoints, got"):
        dpo(model, tiny_tokenizer(), PAIRS, replace(CONFIG, beta=0.2), **options)
    assert (state / "run.json").read_bytes() == before
    with pytest.raises(FileNotFoundError, match="resume: expected an unfinished run's checkpoint"):
        dpo(model, tiny_tokenizer(), PAIRS, CONFIG, state=tmp_path / "none", resume=True)


def test_what_is_refused(monkeypatch):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for config, pairs, message in [
        (replace(CONFIG, beta=0.0), PAIRS, "beta: expected a positive number"),
        (replace(CONFIG, seed=1 << 32), PAIRS, "seed: expected 0 <= seed"),
        (replace(CONFIG, warmup=1.0), PAIRS, "warmup: expected a share below 1"),
        (replace(CONFIG, accumulation=0), PAIRS, "accumulation: expected at least 1"),
        (replace(CONFIG, schedule="linear"), PAIRS, "schedule: expected one of"),
        (replace(CONFIG, max_length=4), PAIRS, "pair 0: expected a prompt of 1 to 3 tokens"),
        (CONFIG, [], "pairs: expected at least one"),
    ]:
        with pytest.raises(ValueError, match=message):
            dpo(model, tokenizer, pairs, config)
    with pytest.raises(ValueError, match=r"model: expected float32 weights, got .*bfloat16"):
        dpo(tiny_model("llama", torch.bfloat16), tokenizer, PAIRS, CONFIG)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'zo_kernels\[dpo\]'"):
        dpo(model, tokenizer, PAIRS, CONFIG)


def test_a_loss_that_is_not_finite_ends_the_run():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(FloatingPointError, match="DPO step 0: expected a finite loss"):
        dpo(model, tiny_tokenizer(), PAIRS, CONFIG)
    assert "forward" not in vars(model)


def test_pairs_are_read_from_both_layouts(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pku = {
        "prompt": "p", "response_0": "a", "response_1": "b", "safer_response_id": 1,
        "better_response_id": 0, "is_response_0_safe": False,
    }  # fmt: skip
    plain = {"prompt": "q", "chosen": "c", "rejected": "d"}
    path.write_text(json.dumps(pku) + "\n\n" + json.dumps(plain) + "\n")
    assert read_pairs(path) == [Pair("p", "b", "a"), Pair("q", "c", "d")]
    assert read_pairs(path, preferred="better")[0] == Pair("p", "a", "b")
    with pytest.raises(ValueError, match="preferred: expected one of"):
        read_pairs(path, preferred="longer")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "whole line: expected a JSON object"),
        ("[1]", "whole line: expected a JSON object"),
        ('{"prompt": "p", "chosen": "c"}', "field 'rejected': expected a non-empty string, got no"),
        ('{"prompt": "p", "chosen": "", "rejected": "r"}', "field 'chosen': expected a non-empty"),
        ('{"prompt": 3, "chosen": "c", "rejected": "r"}', "field 'prompt': .* got 3"),
        (
            '{"prompt": "p", "response_0": "a", "response_1": "b", "safer_response_id": 2}',
            "field 'safer_response_id': expected 0 or 1, got 2",
        ),
        (
            '{"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1}',
            "field 'safer_response_id': expected 0 or 1, got no such field",
        ),
        ('{"prompt": "p", "response_0": "a"}', "field 'response_1': expected a non-empty string"),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"pairs\.jsonl:2: {message}"):
        read_pairs(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="whole file: expected at least one pair"):
        read_pairs(path)


def test_the_command_and_its_resumption(tmp_path, capsys, monkeypatch):
    """zo-kernels dpo: model, log and plot; stopped, refused, resumed to the same bits."""
    checkpoint.save(tiny_model("llama_tied"), tiny_tokenizer(), tmp_path / "base")
    lines = [json.dumps({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected})
             for p in PAIRS]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))

    def run(out, *more):
        options = ["--model", tmp_path / "base", "--data", tmp_path / "pairs.jsonl"]
        options += ["--out", tmp_path / out, "--steps", 5, "--lr", 1e-2, "--save-every", 2]
        return cli.main(["dpo", *map(str, (*options, "--accumulation", 2, *more))])

    torn = tmp_path / "whole.partial.trl" / "checkpoint-2"  # a run killed before it had a whole one
    torn.mkdir(parents=True)
    assert run("whole") == 0 and not torn.parent.exists()
    assert "5 steps in" in capsys.readouterr().out
    original = records_module.MetricsLog.write

    def stop(log, record):
        original(log, record)
        if record["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(records_module.MetricsLog, "write", stop)
    assert run("parts") == 130
    monkeypatch.undo()
    assert run("parts") == 1
    assert "is of an unfinished run; go on with it by --resume" in capsys.readouterr().err
    assert run("parts", "--resume") == 0
    prints, losses = set(), []
    for name in ("whole", "parts"):
        prints.add(checkpoint.fingerprint(checkpoint.load(tmp_path / name, dtype="float32")[0]))
        losses.append([(r["step"], r["loss"]) for r in read_records(tmp_path / f"{name}.jsonl")])
    assert len(prints) == 1 and losses[0] == losses[1] and len(losses[0]) == 5
    assert sorted(p.name for p in tmp_path.glob("parts*")) == ["parts", "parts.jsonl", "parts.png"]
    with monkeypatch.context() as patch:

        def stop_drawing(logs):
            raise KeyboardInterrupt

        patch.setattr("zo_kernels.robustness.plots.loss_per_step", stop_drawing)
        assert run("undrawn") == 130
    assert sorted(p.name for p in tmp_path.glob("undrawn*")) == ["undrawn", "undrawn.jsonl"]
    assert run("parts", "--resume") == 1
    assert "resume: expected what an unfinished run leaves" in capsys.readouterr().err


def test_nothing_is_sent(monkeypatch):
    """No telemetry, whatever the environment says."""
    import trl.trainer.base_trainer as base

    sent = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base, "send_telemetry", lambda *a, **k: sent.append(a), raising=False)
    dpo(tiny_model("llama"), tiny_tokenizer(), PAIRS, replace(CONFIG, steps=1))
    assert sent == [] and dpo_module._libraries()[0].__name__ == "trl"
