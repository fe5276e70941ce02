"""The mode "dual": the losses of streamed for fewer draws, and two threads seen as one caller."""

from __future__ import annotations

import signal
import threading

import pytest
import torch
from helpers import left_behind
from tiny_models import bits, closure_of, same_bits, tiny_model

import zo_kernels as zk
from zo_kernels.backends import native


def test_dual_draws_two_normals_per_weight(monkeypatch):
    """One for the pair, which reads each weight once, and one for the update; streamed draws 3."""
    drawn = {}
    for mode in ("streamed", "dual"):
        counted = []
        for name in ("combine_", "pair_"):
            original = getattr(native, name)

            def spy(dst, *arguments, _call=original, _counted=counted, **options):
                _counted.append(sum(tensor.numel() for tensor in dst))
                return _call(dst, *arguments, **options)

            monkeypatch.setattr(native, name, spy)
        model = tiny_model("llama")
        names = [(n, p) for n, p in model.named_parameters() if "embed" not in n]
        optimizer = zk.ZOSGD(names, lr=1e-3, eps=1e-2, mode=mode)
        closure = closure_of(model)
        optimizer.step(closure)
        monkeypatch.undo()
        drawn[mode] = sum(counted) / sum(p.numel() for _, p in names)
    assert drawn == {"streamed": 3.0, "dual": 2.0}


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "opt", "qwen2"])
def test_dual_has_the_losses_of_streamed(name):
    """Also where the two evaluations choose different experts."""
    losses = {}
    for mode in ("streamed", "dual"):
        model = tiny_model(name)
        optimizer = zk.ZOSGD(model.named_parameters(), lr=1e-3, eps=0.3, mode=mode)
        closure = closure_of(model)
        losses[mode] = []
        for _ in range(3):
            optimizer.step(closure)
            losses[mode] += optimizer.last_step.losses_plus + optimizer.last_step.losses_minus
    assert losses["dual"] == losses["streamed"]


def test_dual_computes_under_the_callers_autocast():
    losses = {}
    for mode in ("streamed", "dual"):
        model = tiny_model("llama")
        optimizer = zk.ZOSGD(model.named_parameters(), lr=0.0, eps=1e-2, mode=mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses[mode] = optimizer.step(closure_of(model))
    assert losses["dual"] == losses["streamed"]


def test_dual_makes_tensors_on_the_callers_default_device():
    """Of both evaluations, for the length of a ``with`` too."""
    w, seen = torch.nn.Parameter(torch.zeros(4)), []
    optimizer = zk.ZOSGD([("w", w)], lr=0.0, mode="dual", diagnostics=False)

    def closure():
        seen.append(torch.empty(1).device.type)
        return (w * 1.0).sum()

    with torch.device("meta"):
        optimizer.step(closure)
    optimizer.step(closure)
    assert seen == ["meta", "meta", "cpu", "cpu"]


def test_an_interrupt_ends_both_sides_of_dual(ctrl_c):
    """Ctrl-C while the main thread only waits for the other side."""
    model = tiny_model("llama")
    before = bits(model)
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1.0, eps=1e-2, mode="dual")
    loss, calls = closure_of(model), []

    def closure():
        result = loss()
        if threading.current_thread() is not threading.main_thread():
            signal.raise_signal(signal.SIGINT)  # its handler runs in the main thread
            loss()
        calls.append(0)
        return result

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert not left_behind() and same_bits(model, before) and optimizer.steps == 0
