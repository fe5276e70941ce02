"""The plan against known counts, against what torch allocates, and against measured peaks."""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measure_plan import examples, run
from tiny_models import CONFIGS
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    FuyuConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    RwkvConfig,
)

from zo_kernels import cli
from zo_kernels.cli.plan import parse_bytes
from zo_kernels.pipeline.footprint import Work, forward_peak
from zo_kernels.pipeline.plan import PREFERENCE, all_plans, choose, plan, plans
from zo_kernels.pipeline.shapes import read_shape
from zo_kernels.refine import first_order

ROOT = Path(__file__).parents[1]
LLAMA = ROOT / "configs" / "llama-3-8b-instruct"
QWEN = ROOT / "configs" / "qwen2-7b-instruct" / "config.json"
FOCUSED = (12, 24, 29, 31)
WIDTHS = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 4000}
MODELS = {
    "llama_tied": LlamaConfig(
        **WIDTHS, intermediate_size=704, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "llama": LlamaConfig(**WIDTHS, intermediate_size=256, num_key_value_heads=8),
    "gpt2": GPT2Config(
        vocab_size=4000, n_embd=256, n_layer=2, n_head=8, bos_token_id=1, eos_token_id=2
    ),
    "opt": OPTConfig(**WIDTHS, ffn_dim=1024, word_embed_proj_dim=256),
}


def test_known_models():
    """Counts of Llama-3-8B and Qwen2-7B, published or by hand."""
    llama, qwen = plan(LLAMA), plan(QWEN)
    assert (llama.parameters, qwen.parameters) == (8_030_261_248, 7_615_616_512)
    assert (llama.selected, llama.normals) == (32 * 218_103_808, 3 * 32 * 218_103_808)
    assert llama.dtype == "bfloat16" and llama.bytes_of("weights") == 2 * llama.parameters + 512
    assert llama.bytes_of("changed copy of the largest leaf") == 2 * 4096 * 14336
    assert llama.bytes_moved == 12 * llama.selected
    assert llama.total_host == llama.bytes_of("weights")


def test_focused_llama():
    """4 of 32 blocks: 1.74 GB of copies, 3.49 GB of masters, hidden states before the first."""
    snapshot, master = plans(LLAMA, ["snapshot", "master"], layers=FOCUSED)
    assert snapshot.bytes_of("snapshot of the selected weights") == 2 * 4 * 218_103_808
    assert master.bytes_of("float32 masters") == 4 * 4 * 218_103_808
    prefix = "hidden states before the first selected block"
    assert master.bytes_of(prefix) == 8 * 512 * 4096 * 2
    assert plan(LLAMA, layers=(0, 31)).bytes_of(prefix) == 0
    assert plan(LLAMA, layers=(1,), micro_batches=3).bytes_of(prefix) == 3 * 8 * 512 * 4096 * 2


def test_embeddings_are_perturbed_where_looked_up(tmp_path):
    """Rows of an untied table, one per token at most; the whole of a tied one."""
    leaf = "changed copy of the largest leaf"
    options = {"parameters": "*embed_tokens*", "dtype": "float32", "batch_size": 2, "length": 100}
    for name, rows in (("llama_tied", 4000), ("llama", 200)):
        MODELS[name].save_pretrained(tmp_path / name)
        found = plan(tmp_path / name, **options)
        assert found.bytes_of(leaf) == rows * 256 * 4
        assert found.normals == (2 * rows + 4000) * 256
        assert plan(tmp_path / name, mode="dual", **options).bytes_of(leaf) == 2 * rows * 256 * 4


def test_quantized_weights_are_read_as_copies():
    """One copy in a streamed mode, of the larger of both leaves; one more in the others."""
    leaf = "changed copy of the largest leaf"
    options = {"quantized": "int4-g64", "parameters": "*k_proj*"}
    for mode, copies in (("streamed", 1), ("dual", 2), ("master", 1), ("mezo", 1)):
        assert plan(LLAMA, mode=mode, **options).bytes_of(leaf) == copies * 2 * 4096 * 14336
        without = plan(LLAMA, mode=mode, parameters="*k_proj*").bytes_of(leaf)
        assert without == (0 if mode in ("master", "mezo") else copies * 2 * 4096 * 1024)


def test_choice_by_budget():
    """The most exact that fits, and what is missing where none does."""
    found = plans(LLAMA, PREFERENCE, layers=FOCUSED, completion=128)
    sizes = {one.mode: one.total_device for one in found}
    assert sizes["master"] > sizes["master8"] > sizes["dual"] > sizes["streamed"]
    for mode in ("master", "master8", "dual", "streamed"):
        assert choose(found, sizes[mode]).mode == mode
    with pytest.raises(ValueError, match=r"got 10\.00 GB; 'streamed' needs least, 17\.\d\d GB, of"):
        choose(found, 10e9)
    wide = plans(LLAMA, PREFERENCE, dtype="float32", layers=FOCUSED)
    assert choose(wide, 1e12).mode == "dual"
    one_block = plans(LLAMA, PREFERENCE, layers=(3,), eps=0.01)
    assert choose(one_block, min(one.total_device for one in one_block)).mode == "inplace"


def allocated(work) -> int:
    """What torch's CPU allocator held at most beyond what it held before."""
    gc.collect()  # so that nothing older is given back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    held = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    return peak


@pytest.fixture
def one_thread():
    """Matrices this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ["forward", "master", "align-adamw", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_plan_is_what_torch_allocates(name, mode, tmp_path, monkeypatch, one_thread):
    """Within 10 %: the formulas leave out rotation tables and statistics of rows (gpt2: sums)."""
    half = torch.bfloat16 if mode == "autocast" else torch.float32
    monkeypatch.setattr(first_order, "fast_dtype", lambda device: half)
    monkeypatch.setattr("zo_kernels.pipeline.plan.fast_dtype", lambda device: half)
    mode = "align-adamw" if mode == "autocast" else mode
    MODELS[name].save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32).eval()
    for rows, completion in ((1, 4), (4, 4), (4, 100)):
        data = examples(rows, 128, completion)
        peak = allocated(lambda data=data, rows=rows: run(model, mode, data, rows))
        if mode == "forward":
            shape = read_shape(tmp_path, torch.float32)
            expected = forward_peak(shape, Work(rows, 128, completion, 4, 4))
        else:
            options = {"batch_size": rows, "length": 128, "completion": completion}
            found = plan(tmp_path, mode=mode, dtype="float32", device="cpu", **options)
            expected = found.total_device - found.bytes_of("weights")
        assert 0.9 < expected / peak < 1.1, (rows, completion, expected, peak)


# A llama of 47 M parameters, whose runs take some 100 MB to 1 GB beyond them.
MEDIUM = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2}
MEDIUM |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 12000}
#: What the interpreter and the libraries take beside torch's tensors, threads' stacks for example.
LIBRARIES = 8e6


MEASURED = ("streamed", "dual", "master", "align-adamw")
WORK = {"batch_size": 2, "length": 256, "completion": 250}


@pytest.fixture(scope="module")
def measurements(tmp_path_factory):
    """A model's directory, and a process for each mode that measures a run's resident peak.

    Freed memory goes back at once, whatever its size: glibc and MKL would keep much of it.
    """
    directory = tmp_path_factory.mktemp("medium")
    LlamaConfig(**MEDIUM).save_pretrained(directory)
    give_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}
    environment = {**os.environ, **give_back, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("measure_plan.py")
    processes = {}
    for mode in MEASURED:
        command = [sys.executable, script, directory, mode, *WORK.values(), "float32"]
        processes[mode] = subprocess.Popen(
            list(map(str, command)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    yield directory, processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak has no reset here")
@pytest.mark.parametrize("mode", MEASURED)
def test_plan_is_the_measured_peak(mode, measurements):
    """From 5 % below to 5 % and ``LIBRARIES`` above the plan."""
    directory, processes = measurements
    found = plan(directory, mode=mode, dtype="float32", device="cpu", **WORK)
    expected = found.total_device - found.bytes_of("weights")
    out, error = processes[mode].communicate(timeout=600)
    assert processes[mode].returncode == 0, error[-2000:]
    peak = int(out.split()[-1])
    assert 0.95 * expected < peak < 1.05 * expected + LIBRARIES, (expected, peak)


def cli_run(*arguments) -> int:
    return cli.main(["plan", *map(str, arguments)])


def test_command(capsys):
    """A table, one mode, JSON."""
    options = ["--model", LLAMA, "--layers", 12, 24, 29, 31, "--completion", 128]
    assert cli_run(*options, "--budget", "24GB") == 0
    out = capsys.readouterr().out
    assert "master: fits into 24.00 GB" in out and "dpo" in out
    assert max(map(len, out.splitlines())) <= 80
    assert cli_run(*options, "--mode", "streamed") == 0
    out = capsys.readouterr().out
    assert "872.42 M" in out and "117.44 MB" in out and "hidden states before" in out
    assert cli_run(*options, "--budget", "18.5GB", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] == "master8" and found["budget"] == 18_500_000_000
    assert [one["mode"] for one in found["plans"]] == [one.mode for one in all_plans(LLAMA)]
    assert cli_run(*options, "--queries", 4, "--json") == 0
    [one, four] = (
        {plan["mode"]: plan["normals"] for plan in plans}
        for plans in (found["plans"], json.loads(capsys.readouterr().out)["plans"])
    )
    assert four["streamed"] == 4 * one["streamed"] and four["dpo"] == one["dpo"]
    assert cli_run(*options, "--mode", "streamed", "--budget", "10GB") == 1
    assert "'streamed' needs least, 17." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "stream"], r"mode: expected one of \['streamed', .*'dpo'\], got 'stream'"),
        (["--layers", "31", "32"], "layers: expected 0 to 31, got 32"),
        (["--parameters", "*.mlpp.*"], "'\\*.mlpp.\\*' matches no parameter"),
        (["--parameters", "*norm*", "--layers", "1", "--quantized", "int9"], "quantized: .*scheme"),
        (["--quantized", "int4-a8"], "quantized: expected one of weights alone, got 'int4-a8'"),
        (["--parameters", "lm_head*", "--layers", "1"], "layers: expected some of 'lm_head\\*' in"),
        (["--mode", "align-sgd", "--layers", "1"], "layers: expected none with mode 'align-sgd'"),
        (["--mode", "align-sgd", "--queries", "4"], "queries: expected 1 with mode .* got 4"),
        (["--dtype", "int8"], "dtype: expected one of .*, got 'int8'"),
        (["--device", "tpu"], "device: expected one of .*, got 'tpu'"),
        (["--completion", "512"], "completion: expected 1 to 511, less than length, got 512"),
        (["--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["--eps", "-1"], "eps: expected a finite number of at least 0, got -1"),
        (["--distribution", "cauchy"], "distribution"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    """Options out of range: status 1, and a line that names the option."""
    assert cli_run("--model", LLAMA, *arguments) == 1
    assert re.search(message, capsys.readouterr().err)


def test_models_that_cannot_be_planned(tmp_path, capsys):
    """No config, a broken one, another kind of model, blocks not modelled or in two lists."""
    with pytest.raises(FileNotFoundError, match=r"expected a Hugging Face directory with config"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected the config of a causal"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match=r"expected the config of a causal language model, got"):
        plan(tmp_path)
    CONFIGS["mixtral"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate' .*activations are not modelled"):
        plan(tmp_path)
    for kind, name in ((MambaConfig, "mamba"), (RwkvConfig, "rwkv")):
        kind(vocab_size=64, hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
        assert cli_run("--model", tmp_path) == 1
        message = f"expected a config with num_attention_heads, got none in '{name}'"
        assert message in capsys.readouterr().err
    text = {**WIDTHS, "intermediate_size": 704, "head_dim": 32}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    Gemma3Config(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"blocks in one list, got 'model.vision_tower.* and 'mod"):
        plan(tmp_path)


def test_the_text_part_of_a_config(tmp_path):
    """Of a model that sees: widths, heads and activation are those of its language model."""
    text = {**WIDTHS, "intermediate_size": 704, "model_type": "llama", "num_key_value_heads": 2}
    FuyuConfig(text_config=text).save_pretrained(tmp_path)
    shape = read_shape(tmp_path, torch.float32)
    assert (shape.name, shape.heads, shape.activation) == ("fuyu", 8, "silu")
    assert [block.key for block in shape.blocks.values()] == [64, 64]


def test_sizes():
    """Decimal and binary units."""
    assert parse_bytes("24GB") == 24 * 10**9 and parse_bytes("22GiB") == 22 * 2**30
    assert parse_bytes("1.5 m") == 1_500_000 and parse_bytes("1000") == 1000
    for text in ("24XB", "", "-1GB", "0GB", "GB"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 24GB"):
            parse_bytes(text)


def test_the_command_line_names_a_wrong_budget(capsys):
    """By argparse, whose status is 2."""
    with pytest.raises(SystemExit) as refused:
        cli_run("--model", LLAMA, "--budget", "24XB")
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert "argument --budget: expected a size such as 24GB or 22GiB, got '24XB'" in error
