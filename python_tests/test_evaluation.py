"""The evaluation suite on tiny models and a tiny tokenizer."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_evaluation import EXAMPLES, TEXT, tiny, tokenizer_of_words
from torch import nn

import zo_kernels as zk
from zo_kernels.chat import Example, render
from zo_kernels.robustness.comparison import SAME
from zo_kernels.robustness.conditions import (
    Condition,
    EvaluationConfig,
    default_conditions,
    parse_scheme,
)
from zo_kernels.robustness.metrics import METRICS
from zo_kernels.robustness.suite import Evaluation
from zo_kernels.robustness.utility import UtilityText


@pytest.fixture
def tokenizer():
    return tokenizer_of_words()


def raw(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters as raw bytes."""
    return {n: p.detach().clone().view(torch.uint8) for n, p in model.named_parameters()}


def evaluate(*arguments, label: str, **options) -> list[dict]:
    """Prepare an evaluation and run it."""
    return Evaluation(*arguments).run(label, **options)


def config(**changes) -> EvaluationConfig:
    """A small evaluation."""
    values = {
        "noise": (0.05, 0.3),
        "draws": 2,
        "max_new_tokens": 4,
        "batch_size": 2,
        "perplexity_tokens": 40,
        "perplexity_window": 16,
    }
    return EvaluationConfig(**(values | changes))


def test_conditions() -> None:
    names = [condition.name for condition in default_conditions(draws=2)]
    assert names == ["clean", "w0.05/0", "w0.05/1", "w0.1/0", "w0.1/1", "int8", "int4"]
    condition = Condition.quantized("int4-asym-g128")
    assert (condition.level, condition.draw, condition.family) == (4.0, None, "int4-asym-g128")
    assert Condition.quantized("nf4-double").level == 4.0
    assert parse_scheme("int4-g128-a8") == {
        "scheme": "int4",
        "symmetric": True,
        "double_quant": False,
        "group_size": 128,
        "activations": "int8",
    }
    names = [c.name for c in default_conditions((), 2, ("int8-a8",), (0.05,))]
    assert names == ["clean", "a0.05/0", "a0.05/1", "int8-a8"]
    assert Condition.quantized("mxfp4-g16").family == "mxfp4-g16"
    wrong = ("int1", "nf5", "int4-g0", "int4-g", "nf4-asym", "int4-double", "int4-g8-asym")
    for bad in (*wrong, "int4-a9"):
        with pytest.raises(ValueError, match=r"scheme|expected -asym of an integer format"):
            Condition.quantized(bad)
    with pytest.raises(ValueError, match="draw"):
        Condition("w1", "weight_noise", 1.0)
    for bad in (
        {"noise_kind": "x"},
        {"noise_on": "x"},
        {"refusal_list": "x"},
        {"generate_under": ("w0.7",)},
        {"draws": 0},
        {"batch_size": 0},
        {"max_prompts": 0},
        {"refusal": " "},
        {"layers": ("clean",)},
        {"layers": ("w0.7",)},
        {"layers": ("a0.2",), "activation_noise": (0.2,)},
        {"layers": ("int8-a8",), "quantization": ("int8-a8",)},
    ):
        with pytest.raises(ValueError):
            config(**bad).conditions()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_evaluate_is_repeatable_and_leaves_no_trace(kind: str, tokenizer) -> None:
    model = tiny(kind).train()
    model.get_submodule("model.layers.0" if kind == "llama" else "transformer.h.0").eval()
    before, modes = raw(model), [module.training for module in model.modules()]
    arrived: list[dict] = []
    runs = [
        evaluate(model, tokenizer, EXAMPLES, TEXT, config(), label="x", on_result=arrived.append)
        for _ in range(2)
    ]
    after = raw(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in model.modules()] == modes
    assert arrived == runs[0] + runs[1]
    for record in arrived:
        assert record.pop("seconds") > 0
    assert runs[0] == runs[1]
    assert json.loads(json.dumps(runs[0], allow_nan=False)) == runs[0]
    by_name = {record["condition"]: record for record in runs[0]}
    assert list(by_name) == [condition.name for condition in config().conditions()]
    assert len({record["refusal_loss"] for record in runs[0]}) == len(runs[0])
    clean = by_name["clean"]
    text = UtilityText(tokenizer, TEXT, window=16, max_tokens=40)
    assert clean["perplexity"] == text.measure(model).perplexity
    assert len(clean["refusal_losses"]) == clean["harmful_count"] == 3
    assert len(clean["harmless_losses"]) == clean["harmless_count"] == 2
    assert clean["refusal_loss"] == pytest.approx(sum(clean["refusal_losses"]) / 3)
    assert clean["refusal_losses"] == pytest.approx(
        [loss_by_hand(model, tokenizer, example) for example in EXAMPLES[:3]], rel=1e-4
    )


def test_evaluate_noise_settings(tokenizer) -> None:
    model = tiny("llama")

    def losses(**changes) -> list[float]:
        small = config(quantization=(), generate_under=(), noise=(0.3,), draws=1, **changes)
        records = evaluate(model, tokenizer, EXAMPLES, TEXT, small, label="x")
        return [record["refusal_loss"] for record in records]

    default = losses()
    for changes in ({"noise_seed": 1}, {"noise_kind": "abs"}, {"noise_on": "all"}):
        clean, noisy = losses(**changes)
        assert clean == default[0] and noisy != default[1], changes


def test_evaluate_activations(tokenizer) -> None:
    """Noise on activations with draws of its own; activations quantised beside weights."""
    model = tiny("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wide = config(
        noise=(), activation_noise=(0.3,), draws=2, quantization=("int4-g16", "int4-g16-a4")
    )
    records = evaluate(model, tokenizer, EXAMPLES, TEXT, wide, label="x")
    found = {record["condition"]: record["refusal_loss"] for record in records}
    assert list(found) == ["clean", "a0.3/0", "a0.3/1", "int4-g16", "int4-g16-a4"]
    assert len(set(found.values())) == 5
    assert [r["kind"] for r in records[1:3]] == ["activation_noise"] * 2
    again = evaluate(model, tokenizer, EXAMPLES, TEXT, wide, label="x")
    assert [r["refusal_loss"] for r in again] == list(found.values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def loss_by_hand(model: nn.Module, tokenizer, example: Example) -> float:
    """Mean negative log likelihood of completion and end token, in one unpadded forward."""
    prompt = render(tokenizer, example.prompt)
    answer = [*tokenizer.encode(example.completion), tokenizer.eos_token_id]
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    table = torch.log_softmax(logits, -1)
    return -sum(table[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer)) / len(answer)


def test_evaluate_counts_refusals(tokenizer, monkeypatch) -> None:
    def answers(model, tokenizer, prompts, **kwargs):
        return ["I can't help" if "how" in prompt else "Sure" for prompt in prompts]

    monkeypatch.setattr("zo_kernels.robustness.suite.generate", answers)
    records = evaluate(
        tiny("llama"),
        tokenizer,
        EXAMPLES,
        TEXT,
        config(generate_under=("clean", "w0.3"), quantization=("int4-g16",)),
        label="x",
    )
    for record in records:
        if record["family"] in ("clean", "w0.3"):
            assert record["refused"] == [1, 1, 0] and record["over_refused"] == [1, 0]
            assert record["refusal_rate"] == pytest.approx(2 / 3)
            assert record["over_refusal_rate"] == 0.5
        else:
            assert record["refusal_rate"] is None and record["harmful_answers"] is None


def test_evaluate_reports_divergence_and_bad_input(tokenizer) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    wide = config(noise=(), quantization=(), generate_under=())
    [record] = evaluate(model, tokenizer, EXAMPLES, TEXT, wide, label="x")
    assert record["refusal_loss"] is None and record["perplexity"] is None
    assert record["non_finite"] == ["refusal_loss", "harmless_loss", "perplexity", "divergence"]
    assert record["refusal_losses"] == [None] * 3
    with pytest.raises(ValueError, match="3 harmful and 0 harmless"):
        evaluate(model, tokenizer, EXAMPLES[:3], TEXT, config(), label="x")


def test_evaluate_finds_degenerate_answers(tokenizer, monkeypatch) -> None:
    """Empty and repeated answers, and what the clean model would not have said."""

    def answers(model, tokenizer, prompts, **kwargs):
        return ["", "tea " * 40, "b c"][: len(prompts)]

    monkeypatch.setattr("zo_kernels.robustness.suite.generate", answers)
    plain = config(noise=(), quantization=())
    [record] = evaluate(tiny("llama"), tokenizer, EXAMPLES, TEXT, plain, label="x")
    assert record["degenerate"][:2] == ["empty", "repetitive"]
    assert record["surprise"][0] is None
    prompt = render(tokenizer, EXAMPLES[2].prompt)
    ids = tokenizer.encode("b c")
    with torch.no_grad():
        logits = tiny("llama")(input_ids=torch.tensor([prompt + ids])).logits[0].double()
    table = torch.log_softmax(logits, -1)
    by_hand = -sum(table[len(prompt) - 1 + i, t].item() for i, t in enumerate(ids)) / len(ids)
    assert record["surprise"][2] == pytest.approx(by_hand, rel=1e-4)
    assert record["degenerate"][2] == ("incoherent" if by_hand > 4 else None)
    assert record["complied"] == [0, 0, int(by_hand <= 4)]
    assert record["degenerate_rate"] == pytest.approx((4 + (by_hand > 4)) / 5)
    assert len(record["broken"]) == 5


def test_evaluate_prompts_without_completions(tokenizer) -> None:
    """The loss of the configured refusal for harmful ones, none for harmless ones."""
    bare = [replace(example, completion="") for example in EXAMPLES]
    short = config(noise=(), quantization=(), generate_under=(), refusal="I can't help")
    [record] = evaluate(tiny("llama"), tokenizer, bare, TEXT, short, label="x")
    told = [replace(e, completion="I can't help") for e in EXAMPLES[:3]]
    [same] = evaluate(tiny("llama"), tokenizer, [*told, *bare[3:]], TEXT, short, label="x")
    assert record["refusal_losses"] == same["refusal_losses"]
    assert record["harmless_losses"] == [None, None] and record["harmless_loss"] is None
    long = replace(bare[4], prompt="tea " * 600)
    with pytest.raises(ValueError, match="max_length 512"):
        evaluate(tiny("llama"), tokenizer, [*bare, long], TEXT, short, label="x")


def test_evaluate_goes_on_where_it_was_cut_off(tokenizer) -> None:
    model, seen = tiny("llama"), []
    whole = evaluate(model, tokenizer, EXAMPLES, TEXT, config(), label="x")
    rest = evaluate(
        model, tokenizer, EXAMPLES, TEXT, config(), label="x",
        finished=[whole[3], whole[0]], on_result=seen.append,
    )  # fmt: skip
    assert [r["condition"] for r in seen] == [
        r["condition"] for i, r in enumerate(whole) if i not in (0, 3)
    ]
    assert [r | {"seconds": 0} for r in rest] == [r | {"seconds": 0} for r in whole]


def test_evaluate_progress_reaches_its_total(tokenizer) -> None:
    calls: list[tuple[str, float, float]] = []
    evaluate(
        tiny("llama"), tokenizer, EXAMPLES, TEXT, config(draws=1, layers=("w0.3",)), label="x",
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    done = [call[1] for call in calls]
    assert done == sorted(done) and calls[-1][1] == calls[-1][2] == max(done)
    assert len({call[2] for call in calls}) == 1
    assert calls[0][0] == "clean: losses" and calls[-1][0] == "done"


def test_evaluate_in_one_block_at_a_time(tokenizer) -> None:
    """Only the block's linears are disturbed, by the noise that the whole model would get."""
    model = tiny("llama")
    before = raw(model)
    chosen = config(noise=(0.3,), quantization=("int2",), layers=("w0.3", "int2"), draws=2,
                    layer_prompts=2, generate_under=())  # fmt: skip
    records = evaluate(model, tokenizer, EXAMPLES, TEXT, chosen, label="x")
    found = {r["condition"]: r for r in records if r["block"] is not None}
    assert list(found) == ["w0.3@0/0", "w0.3@1/0", "w0.3@0/1", "w0.3@1/1", "int2@0", "int2@1"]
    assert found["int2@1"]["block"] == "model.layers.1" and found["int2@1"]["block_number"] == 1
    assert all(len(r["refusal_losses"]) == 2 for r in found.values())
    assert len({r["refusal_loss"] for r in found.values()}) == 6
    assert all(r["perplexity"] is None for r in found.values())
    inside = "model.layers.1.*proj.weight"
    with zk.perturbed(model, sigma=0.3, seed=0, draw=1, parameters=inside):
        by_hand = [loss_by_hand(model, tokenizer, example) for example in EXAMPLES[:2]]
    assert found["w0.3@1/1"]["refusal_losses"] == pytest.approx(by_hand, rel=1e-4)
    assert all(torch.equal(before[n], p.view(torch.uint8)) for n, p in raw(model).items())


def test_evaluate_with_a_copy_of_the_weights(tokenizer) -> None:
    """Faster, and the same records."""
    model = tiny("llama")
    before = raw(model)
    runs = []
    for copy in (False, True):
        chosen = config(noise=(), quantization=("int4-g16", "int4-a8"), copy_weights=copy)
        records = evaluate(model, tokenizer, EXAMPLES, TEXT, chosen, label="x")
        runs.append([record | {"seconds": 0} for record in records])
    assert runs[0] == runs[1]
    assert all(torch.equal(before[name], bits) for name, bits in raw(model).items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_evaluate_answers_alike_at_every_batch_size(kind: str, tokenizer) -> None:
    """Under every kind of disturbance; rounded inputs too, which are answered one by one."""
    model = tiny(kind)
    wide = {
        "noise": (0.3,),
        "draws": 1,
        "activation_noise": (0.3,),
        "quantization": ("int4-g16", "int4-g16-a4"),
    }
    runs = [
        evaluate(model, tokenizer, EXAMPLES, TEXT, config(batch_size=size, **wide), label="x")
        for size in (1, 2, 5)
    ]
    answers = [[(r["harmful_answers"], r["harmless_answers"]) for r in run] for run in runs]
    assert answers[0] == answers[1] == answers[2]
    assert len({str(a) for a in answers[0]}) > 2
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            if not a["family"].endswith("-a4"):
                assert a["refusal_losses"] == pytest.approx(b["refusal_losses"], rel=1e-4)


def test_every_metric_has_its_field_in_a_record(tokenizer) -> None:
    [record] = evaluate(
        tiny("llama"), tokenizer, EXAMPLES, TEXT, config(noise=(), quantization=()), label="x"
    )
    assert set(SAME) <= record.keys()
    for metric in METRICS.values():
        if not metric.field.startswith("asr_"):  # a judge's
            assert record[metric.field] is not None and record[metric.items], metric.field
