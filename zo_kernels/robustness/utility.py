"""How well a model still predicts plain text: perplexity, and divergence from the clean model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels.activations import sequences
from zo_kernels.robustness.answers import eval_mode

_ROWS = 64  # positions whose distributions are in memory at a time


@dataclass(frozen=True)
class Utility:
    """What a text says of a model.

    Attributes:
        losses: of each window, mean negative log likelihood in nats per token; inf or NaN where
            the model overflows.
        divergences: of each window, mean of KL(clean || model) in nats per token; None without a
            clean model to compare with.
    """

    losses: list[float]
    divergences: list[float] | None

    @property
    def perplexity(self) -> float:
        """exp of the mean loss over all predicted tokens; inf where that overflows."""
        try:
            return math.exp(math.fsum(self.losses) / len(self.losses))
        except OverflowError:
            return math.inf

    @property
    def divergence(self) -> float | None:
        """Mean KL(clean || model) over all predicted tokens, in nats per token."""
        if self.divergences is None:
            return None
        return math.fsum(self.divergences) / len(self.divergences)


class UtilityText:
    """A text to measure a model on, and the clean model's distributions over it.

    The text is tokenised without special tokens, cut to its first `max_tokens` tokens and then
    into non-overlapping windows of `window` tokens, which all weigh the same: what is left over is
    left out (a text shorter than a window is one window). Within a window each token but the first
    is predicted from those before it. Log likelihoods are taken in float32 whatever the model's
    dtype and summed in float64.

    The clean distributions (4 bytes per token and vocabulary entry: 0.8 GB for 4,096 tokens and
    49,152 entries) wait in an unnamed temporary file (TMPDIR), not in memory.

    Args:
        tokenizer: the model's.
        text: plain text.
        window: tokens, at least 2.
        max_tokens: the first so many, at least 2; None: all.

    Raises:
        ValueError: window or max_tokens below 2, or fewer than 2 tokens of text.
    """

    def __init__(
        self, tokenizer: Any, text: str, *, window: int = 256, max_tokens: int | None = None
    ) -> None:
        if window < 2:
            raise ValueError(f"expected a window of at least 2 tokens, got {window}")
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(f"expected max_tokens >= 2 or None, got {max_tokens}")
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)[:max_tokens]
        if len(ids) < 2:
            raise ValueError(f"expected a text of at least 2 tokens, got {len(ids)}")
        size = min(window, len(ids))
        self.windows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        self._clean: Any = None
        self._vocabulary = 0

    def keep_clean(self, model: Any) -> None:
        """Take this model's distributions for the clean ones.

        Raises:
            OSError: there is no room for them; says how much they take, and where.
        """
        self.close()
        with eval_mode(model), torch.no_grad():
            for part in self.windows:
                for logits in _logits(model, part):
                    self._vocabulary = logits.shape[1]
                    self._keep(_log_probabilities(logits).cpu().numpy().tobytes())

    def _keep(self, data: bytes) -> None:
        try:
            if self._clean is None:
                self._clean = tempfile.TemporaryFile(prefix="zo-kernels-")
            self._clean.write(data)
        except OSError as error:
            size = sum(len(part) - 1 for part in self.windows) * self._vocabulary * 4
            raise OSError(
                f"the clean model's distributions: expected room for {size / 2**20:.0f} MB in "
                f"{tempfile.gettempdir()} (TMPDIR says where; fewer perplexity_tokens take less): "
                f"{error}"
            ) from error

    def close(self) -> None:
        """Let the clean distributions go."""
        if self._clean is not None:
            self._clean.close()
            self._clean = None

    def measure(self, model: Any, *, first_number: int = 0) -> Utility:
        """Measure a model, against the clean one where there is one.

        Args:
            model: a transformers causal language model.
            first_number: of the first window, for activation noise (`activations.sequences`).
        """
        losses, divergences = [], []
        if self._clean is not None:
            self._clean.seek(0)
        with eval_mode(model), torch.no_grad():
            for number, part in enumerate(self.windows, first_number):
                loss, divergence, done = 0.0, 0.0, 1
                with sequences([number], [0]):
                    chunks = _logits(model, part)
                for logits in chunks:
                    rows = _log_probabilities(logits)
                    wanted = torch.tensor(part[done : done + len(rows)], device=rows.device)
                    loss -= rows.gather(1, wanted[:, None]).double().sum().item()
                    done += len(rows)
                    if self._clean is not None:
                        divergence += self._divergence(rows)
                losses.append(loss / (done - 1))
                divergences.append(divergence / (done - 1))
        return Utility(losses, None if self._clean is None else divergences)

    def _divergence(self, rows: Tensor) -> float:
        """Sum over the rows of KL(clean || rows); reads the next of the clean ones."""
        if rows.shape[1] != self._vocabulary:
            raise ValueError(
                f"expected {self._vocabulary} logits per token, as the clean model has, got "
                f"{rows.shape[1]}"
            )
        data = bytearray(rows.numel() * 4)
        self._clean.readinto(data)
        clean = torch.from_numpy(np.frombuffer(data, np.float32)).view(rows.shape).to(rows.device)
        terms = torch.where(clean == -torch.inf, 0.0, clean.exp() * (clean - rows))
        return terms.sum(dtype=torch.float64).item()


def _logits(model: Any, ids: Sequence[int]) -> tuple[Tensor, ...]:
    """Logits of all positions but the last, in chunks [up to _ROWS, vocabulary]."""
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
    return logits[0, :-1].split(_ROWS)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)
