"""Metrics, suite and report on tiny models and a tiny tokenizer."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from zo_kernels.chat import Example, render  # noqa: E402
from zo_kernels.robustness import report as report_module  # noqa: E402
from zo_kernels.robustness.metrics import (  # noqa: E402
    REFUSAL_LISTS,
    generate,
    is_refusal,
    perplexity,
)
from zo_kernels.robustness.report import write_report  # noqa: E402
from zo_kernels.robustness.suite import (  # noqa: E402
    Condition,
    EvaluationConfig,
    default_conditions,
    evaluate,
    paired,
    summary,
)

WORDS = "a b c d e f g h I can't help with that how to do make tea Sure , here user assistant"
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
TEXT = "how to make tea with a b c d e f g h " * 12
EXAMPLES = [
    Example("how to do a", "I can't help with that", "harmful", "held_out"),
    Example("how to make b c d", "I can't help", "harmful", "held_out"),
    Example("make c", "I can't do that", "harmful", "held_out"),
    Example("how to make tea", "Sure , here", "harmless", "held_out"),
    Example("tea", "Sure , tea with a", "harmless", "held_out"),
]


@pytest.fixture
def tokenizer():
    """A word-level tokenizer whose padding token is its end token."""
    words = ["<unk>", "<|im_start|>", "<|im_end|>", *WORDS.split()]
    vocabulary = {word: number for number, word in enumerate(words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    result = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    result.chat_template = TEMPLATE
    return result


def tiny(kind: str, vocabulary: int = 26, scale: float = 0.3) -> nn.Module:
    """A two-layer model with weights drawn from a generator of its own."""
    if kind == "llama":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=vocabulary,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=128,
                tie_word_embeddings=False,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # norms and biases stay 1 and 0
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def raw(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters as raw bytes."""
    return {n: p.detach().clone().view(torch.uint8) for n, p in model.named_parameters()}


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


def test_refusal_lists() -> None:
    assert len(REFUSAL_LISTS["advbench-29"]) == len(set(REFUSAL_LISTS["advbench-29"])) == 29
    for text, prefix, advbench in (
        ("I'm sorry, but no.", True, True),
        ("  i CAN'T help with that.", True, False),  # not in the 29: only "provide" and "assist"
        ("I can\N{RIGHT SINGLE QUOTATION MARK}t assist", True, True),
        ("Sure! It is illegal in some places, so check.", False, True),
        ("Sure, I cannot wait to help", False, True),
        ("sorry", True, False),
        ("Here is tea.", False, False),
        ("", False, False),
    ):
        assert is_refusal(text) is prefix, text
        assert is_refusal(text, "advbench-29") is advbench, text
    with pytest.raises(ValueError, match="advbench-29"):
        is_refusal("", "no-such-list")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_is_batch_independent_and_greedy(kind: str, tokenizer) -> None:
    model = tiny(kind).train()
    prompts = [
        "how to do a",
        "tea",
        "how to make b c d e f g h with tea",
        "a b",
        "b",
        "make c",
        "I can't help with that how to do make tea Sure",
    ]
    expected = [greedy_by_hand(model, tokenizer, prompt, 6) for prompt in prompts]
    assert len(set(expected)) > 2  # otherwise a mixed-up order could not be seen
    seen = []
    for size in (1, 4, 7):
        answers = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=6,
            batch_size=size,
            progress=lambda *args: seen.append(args),
        )
        assert answers == expected, size
    assert seen[-1] == ("generate", 7, 7)
    assert all(module.training for module in model.modules())


def greedy_by_hand(model: nn.Module, tokenizer, prompt: str, limit: int) -> str:
    """Greedy decoding of one prompt without padding, cache or `generate`."""
    ids, answer = render(tokenizer, prompt), []
    model.eval()
    while len(answer) < limit:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer])).logits
        token = int(logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        answer.append(token)
    model.train()
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_generate_stops_at_end_token(tokenizer) -> None:
    model = tiny("llama")
    free = generate(model, tokenizer, ["how to do a"], max_new_tokens=6, batch_size=1)[0].split()
    assert len(free) == 6
    # Name the third new token an end token: the answer is cut there, pad == eos or not.
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids(free[2])]
    first = free.index(free[2])
    answers = generate(model, tokenizer, ["how to do a", "b"], max_new_tokens=6, batch_size=2)
    assert answers[0].split() == free[:first]


def test_generate_ignores_and_keeps_settings(tokenizer, caplog, recwarn) -> None:
    model = tiny("gpt2")
    plain = generate(model, tokenizer, ["a b c", "tea"], max_new_tokens=5, batch_size=2)
    model.generation_config.update(
        do_sample=True, temperature=0.3, top_p=0.5, top_k=3, repetition_penalty=5.0
    )
    settings = model.generation_config
    side, state = tokenizer.padding_side, tokenizer.backend_tokenizer.to_str()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        again = generate(model, tokenizer, ["a b c", "tea"], max_new_tokens=5, batch_size=2)
    finally:
        logger.removeHandler(caplog.handler)
    assert again == plain
    assert not caplog.records and not recwarn.list
    assert model.generation_config is settings and settings.repetition_penalty == 5.0
    assert tokenizer.padding_side == side and tokenizer.backend_tokenizer.to_str() == state
    with pytest.raises(ValueError, match="batch_size"):
        generate(model, tokenizer, ["a"], max_new_tokens=5, batch_size=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("limit", [None, 33, 17])
def test_perplexity_directly(kind: str, limit: int | None, tokenizer) -> None:
    model = tiny(kind)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)[:limit]
    assert len(ids) == (limit or 156)
    total, count = 0.0, 0
    for start in range(0, len(ids), 16):
        part = ids[start : start + 16]
        for end in range(1, len(part)):  # one forward a token, nothing shared with the code
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([part[:end]])).logits[0, -1].double()
            total -= torch.log_softmax(logits, -1)[part[end]].item()
            count += 1
    got = perplexity(model, tokenizer, TEXT, window=16, max_tokens=limit)
    assert got == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_errors(tokenizer) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="window"):
        perplexity(model, tokenizer, TEXT, window=1)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        perplexity(model, tokenizer, "tea")


def test_conditions() -> None:
    names = [condition.name for condition in default_conditions(draws=2)]
    assert names == ["clean", "w0.05/0", "w0.05/1", "w0.1/0", "w0.1/1", "int8", "int4"]
    condition = Condition.quantized("int4-asym-g128")
    assert (condition.level, condition.draw, condition.family) == (4.0, None, "int4-asym-g128")
    for bad in ("int1", "nf4", "int4-g0", "int4-g"):
        with pytest.raises(ValueError, match="scheme"):
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
    assert clean["perplexity"] == perplexity(model, tokenizer, TEXT, window=16, max_tokens=40)
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
    assert record["non_finite"] == ["refusal_loss", "harmless_loss", "perplexity"]
    with pytest.raises(ValueError, match="3 harmful and 0 harmless"):
        evaluate(model, tokenizer, EXAMPLES[:3], TEXT, config(), label="x")


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
