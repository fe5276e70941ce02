"""Alignment, the refiner, checkpoints and logs, on tiny models."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from tiny_models import EXAMPLES, bits, tiny_encoded, tiny_model, tiny_tokenizer

from zo_kernels import chat
from zo_kernels.blocks import linear_weights
from zo_kernels.refine import checkpoint
from zo_kernels.refine.align import AlignConfig, align, learning_rate_factor
from zo_kernels.refine.config import RefineConfig, select_parameters
from zo_kernels.refine.records import MetricsLog, logged_records, read_records
from zo_kernels.refine.refiner import ZORefiner


def test_align_learns_the_completions():
    model = tiny_model("llama")
    seen = []
    records = align(
        model, tiny_tokenizer(), tiny_encoded(), AlignConfig(steps=60, batch_size=4, lr=1e-2),
        on_step=seen.append,
    )  # fmt: skip
    assert records == seen and [r["step"] for r in records] == list(range(60))
    assert records[-1]["loss"] < 0.3 < 2 < records[0]["loss"]
    assert all(p.grad is None for p in model.parameters())


def test_align_is_reproducible_and_sgd_is_plain():
    """Two runs give the same bits; one SGD step is p - lr * clipped gradient."""
    config = AlignConfig(steps=5, batch_size=2, lr=1e-2)
    models = [tiny_model("llama"), tiny_model("llama")]
    for model in models:
        align(model, tiny_tokenizer(), tiny_encoded(), config)
    assert all(torch.equal(b, bits(models[0])[k]) for k, b in bits(models[1]).items())

    model, copy = tiny_model("llama"), tiny_model("llama")
    config = AlignConfig(
        steps=1, batch_size=2, lr=0.5, optimizer="sgd", warmup=0.0, clip_norm=9e9,
        precision="float32",
    )  # fmt: skip
    align(model, tiny_tokenizer(), tiny_encoded(), config)
    batch = next(chat.batch_stream(tiny_encoded(), batch_size=2, seed=0, pad_id=2))
    chat.completion_loss(copy, batch).backward()
    for moved, start in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.allclose(moved, start - 0.5 * start.grad, atol=1e-7)


def test_learning_rate_schedule():
    config = AlignConfig(steps=20, warmup=0.1, schedule="cosine")
    factors = [learning_rate_factor(step / 20, config) for step in range(20)]
    assert factors[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert factors[11] == pytest.approx(0.5) and 0 < factors[19] < 0.01
    flat = AlignConfig(steps=20, warmup=0.0, schedule="constant")
    assert {learning_rate_factor(step / 20, flat) for step in range(20)} == {1.0}


def test_the_schedule_ends_with_the_time_too(monkeypatch):
    """With few of many steps taken, lr has still come down with the seconds."""
    clock = itertools.count(step=0.01)  # a busy machine has seconds without steps
    monkeypatch.setattr("zo_kernels.refine.align.time.perf_counter", lambda: next(clock))
    config = AlignConfig(steps=10_000, seconds=1.0, batch_size=2, warmup=0.2)
    records = align(tiny_model("llama"), tiny_tokenizer(), tiny_encoded(), config)
    rates = [r["lr"] for r in records]
    assert 20 < len(records) < 5000 and max(rates) > 0.8 * config.lr
    assert rates[0] < 0.2 * config.lr and rates[-1] < 0.1 * config.lr


def test_align_stops_on_a_non_finite_loss_before_the_update():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    before = bits(model)
    with pytest.raises(FloatingPointError, match="step 0: expected a finite loss"):
        align(model, tiny_tokenizer(), tiny_encoded(), AlignConfig(steps=2))
    assert all(torch.equal(b, before[k]) for k, b in bits(model).items())


def test_seconds_end_a_run():
    model = tiny_model("llama")
    records = align(model, tiny_tokenizer(), tiny_encoded(), AlignConfig(steps=10_000, seconds=0.3))
    assert 1 <= len(records) < 10_000 and records[-1]["seconds"] >= 0.3
    refiner = ZORefiner(model, tiny_tokenizer(), RefineConfig(steps=10_000, seconds=0.3))
    records = refiner.run(tiny_encoded())
    assert 1 <= len(records) < 10_000 and records[-1]["seconds"] >= 0.3


def test_refiner_lowers_the_loss():
    model = tiny_model("llama")
    config = RefineConfig(
        steps=150, batch_size=4, lr=3.0, eps=0.3, parameters="*layers*proj*, lm_head*"
    )
    losses = [r["loss"] for r in ZORefiner(model, tiny_tokenizer(), config).run(EXAMPLES)]
    assert sum(losses[-20:]) / 20 < sum(losses[:20]) / 20 - 0.2


def test_refiner_moves_its_parameters_and_no_other():
    model = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ZORefiner(model, tiny_tokenizer(), RefineConfig(steps=3)).run(EXAMPLES)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(linear_weights(model))


def test_refiner_with_zero_lr_is_bit_identical():
    model = tiny_model("llama", torch.bfloat16)
    before = checkpoint.fingerprint(model)
    records = ZORefiner(model, tiny_tokenizer(), RefineConfig(steps=10, lr=0.0)).run(tiny_encoded())
    assert checkpoint.fingerprint(model) == before
    assert len({tuple(r["losses_plus"]) for r in records}) == 10


def test_refiner_is_reproducible_and_follows_its_schedule():
    config = RefineConfig(steps=4, lr=1e-2, schedule="cosine", queries=2)
    models, logs = [], []
    for _ in range(2):
        models.append(tiny_model("qwen2", torch.bfloat16))
        records = ZORefiner(models[-1], tiny_tokenizer(), config).run(tiny_encoded())
        logs.append([{k: v for k, v in r.items() if k != "seconds"} for r in records])
    assert logs[0] == logs[1]
    assert checkpoint.fingerprint(models[0]) == checkpoint.fingerprint(models[1])
    assert [r["lr"][0] for r in logs[0]] == pytest.approx(
        [1e-2, 0.854e-2, 0.5e-2, 0.146e-2], rel=1e-2
    )


def test_select_parameters():
    model = tiny_model("llama")
    assert len(select_parameters(model, "linear")) == 14
    assert len(select_parameters(model, "all")) == len(list(model.parameters()))
    assert [n for n, _ in select_parameters(model, "*.0.*up_proj*, *.norm.*")] == [
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    ]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AlignConfig, {"steps": 0}, "steps: expected at least 1, got 0"),
        (AlignConfig, {"lr": -1.0}, "lr: expected at least 0"),
        (AlignConfig, {"warmup": 1.0}, "warmup: expected a share below 1"),
        (AlignConfig, {"optimizer": "lion"}, "optimizer: expected one of"),
        (AlignConfig, {"seconds": 0.0}, "seconds: expected a positive number, got 0.0"),
        (AlignConfig, {"seconds": math.nan}, "seconds: expected a positive number, got nan"),
        (AlignConfig, {"clip_norm": math.nan}, "clip_norm: expected a positive number, got nan"),
        (RefineConfig, {"batch_size": 0}, "batch_size: expected at least 1"),
        (RefineConfig, {"mode": "magic"}, "mode: expected one of"),
        (RefineConfig, {"schedule": "linear"}, "schedule: expected one of"),
        (RefineConfig, {"seconds": -1.0}, "seconds: expected a positive number"),
    ],
)
def test_bad_options_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options).check()


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_checkpoints_load_with_from_pretrained(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = tiny_model(name), tiny_tokenizer()
    path = checkpoint.save(model, tokenizer, tmp_path / "model")
    checkpoint.save(model, tokenizer, path)  # replacing a checkpoint is fine
    loaded, loaded_tokenizer = checkpoint.load(path, dtype="float32")
    assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(model)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert checkpoint.fingerprint(plain) == checkpoint.fingerprint(model)
    assert chat.render(loaded_tokenizer, "open the door") == chat.render(tokenizer, "open the door")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]  # no work folder is left


def test_checkpoint_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        checkpoint.load(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        checkpoint.save(tiny_model("llama"), tiny_tokenizer(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    path = checkpoint.save(tiny_model("llama"), tiny_tokenizer(), tmp_path / "m")
    with pytest.raises(ValueError, match="dtype: expected auto or one of"):
        checkpoint.load(path, dtype="int8")
    with pytest.raises(ValueError, match=r"device: expected a GPU out of the \d+ .*, got cuda:99"):
        checkpoint.load(path, device="cuda:99")
    with pytest.raises(ValueError, match="device: expected a torch device, got 'gpu'"):
        checkpoint.load(path, device="gpu")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    path = checkpoint.save(model, tokenizer, tmp_path / "model")

    class Full:
        def save_pretrained(self, folder):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoint.save(model, Full(), path)
    loaded, _ = checkpoint.load(path, dtype="float32")
    assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(model)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_fingerprint_sees_every_bit():
    model = tiny_model("llama")
    before = checkpoint.fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nextafter(model.model.norm.weight[3], torch.tensor(9.0))
    assert checkpoint.fingerprint(model) != before


def test_metrics_log(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    with MetricsLog(path) as log:
        log.write({"a": 1.5, "bad": math.nan, "list": [math.inf, 2]})
    with MetricsLog(path) as log:
        log.write({"a": 2})
    assert read_records(path) == [{"a": 1.5, "bad": None, "list": [None, 2]}, {"a": 2}]
    path.write_text(path.read_text() + '{"torn": ')
    assert len(read_records(path)) == 2
    path.write_text('{"x": 1}\nnonsense\n' + json.dumps({"y": 2}) + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl:2: expected a JSON object, got 'nonsense'"):
        read_records(path)
    path.write_text('{"x": 1}\n{"torn": ')
    with MetricsLog(path) as log:
        log.write({"y": 2})
    assert read_records(path) == [{"x": 1}, {"y": 2}]
    with MetricsLog(path, fresh=True):
        assert path.read_text() == ""


@pytest.mark.filterwarnings("ignore:ZOSGD. step 0 skipped")
def test_losses_that_were_not_finite_are_read_as_nan(tmp_path):
    """Null in JSON, which no number's format takes; what else is null stays so."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.inf
    config = RefineConfig(steps=2, eps=0.0, lr=0.0, curvature_every=1)
    refiner = ZORefiner(model, tiny_tokenizer(), config)
    path, log = tmp_path / "lines.jsonl", tmp_path / "log"
    with MetricsLog(path) as lines:
        refiner.run(EXAMPLES, log=log, on_step=lines.write)
    read = read_records(path)[0]
    assert read["loss"] is None and read["losses_plus"] == [None] and read["trace"] is None
    record = logged_records(path, log)[0]
    losses = (record["loss"], record["clean_loss"], *record["losses_plus"], *record["losses_minus"])
    assert len(losses) == 4 and all(map(math.isnan, losses)) and f"{losses[0]:.4f}" == "nan"
    assert record["trace"] is None and record["seconds"] == read["seconds"]
