"""An alignment that kills itself; a program of its own.

    python kill_alignment.py STATE step      SIGKILL between two steps
    python kill_alignment.py STATE write     SIGKILL while the state is written the second time

What it leaves under STATE must let the run go on; see test_alignment.py.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from tiny_alignment import CONFIG, EVERY, encoded
from tiny_models import tiny_model, tiny_tokenizer

from zo_kernels.refine.align import align


def die() -> None:
    """As by a power cut: nothing is flushed, no finally runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Align until death."""
    state, moment = sys.argv[1:]
    save, calls = torch.save, []

    def half(content: Any, stream: Any) -> None:
        """torch.save, the second time torn."""
        calls.append(None)
        save(content, stream)
        if len(calls) == 2:
            stream.truncate(stream.tell() // 2)
            die()

    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == 2 * EVERY + 1:
            die()

    if moment == "write":
        torch.save = half
    align(
        tiny_model("llama_tied", torch.bfloat16), tiny_tokenizer(), encoded(), CONFIG,
        state=state, save_every=EVERY, on_step=on_step,
    )  # fmt: skip


if __name__ == "__main__":
    main()
