"""uninterrupted: Ctrl-C waits for the end of a block, and is not lost."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from zo_kernels.modes import uninterrupted


def test_interrupts_wait_for_the_end_of_a_pass(ctrl_c):
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("the rest of the block")
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_is_not_lost_with_the_block(ctrl_c):
    """The handler is called where the block fails, and the exception of the block goes with it."""
    with pytest.raises(KeyboardInterrupt) as caught, uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("of the block")
    assert isinstance(caught.value.__context__, ValueError)
    calls = []
    signal.signal(signal.SIGINT, lambda *arguments: calls.append(arguments[0]))
    with pytest.raises(ValueError, match="of the block"), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("of the block")
    assert calls == [signal.SIGINT]


def test_an_interrupt_ends_a_process_that_it_would_have_ended():
    """With the system's own handling, after the block."""
    code = (
        "import signal\n"
        "from zo_kernels.modes import uninterrupted\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "with uninterrupted():\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('the rest of the block', flush=True)\n"
        "print('and more', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (-signal.SIGINT, "the rest of the block\n")


def test_a_handler_that_python_did_not_set_is_left_alone(monkeypatch):
    """getsignal has None for it, which nobody can set again."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("a handler was set"))
    done = []
    with uninterrupted():
        done.append("the block")
    assert done
