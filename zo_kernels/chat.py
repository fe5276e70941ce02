"""Prompt and completion pairs: reading, encoding, batching and the loss on the completion.

Everything that decides which tokens a training step sees is a pure function of its arguments, so
a resumed run and a run on another machine see the same batches.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import count as count_from
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HARMFUL = "harmful"
HARMLESS = "harmless"
TRAIN = "train"
HELD_OUT = "held_out"
IGNORED = -100  # label of positions outside the completion
FALLBACK_FORMAT = "User: {prompt}\nAssistant:"

_KINDS = {HARMFUL: HARMFUL, HARMLESS: HARMLESS, "benign": HARMLESS}
_SPLITS = (TRAIN, HELD_OUT)


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction with the answer wanted: a refusal if ``kind`` is harmful, else help.

    ``context`` is a text that the instruction is about, or "". ``completion`` is "" where none is
    known: such an example can be answered, not trained on.
    """

    prompt: str
    completion: str
    kind: str
    split: str = TRAIN
    context: str = ""

    @property
    def message(self) -> str:
        """The user's turn: the prompt, after its context as HarmBench puts it."""
        return f"{self.context}\n\n---\n\n{self.prompt}" if self.context else self.prompt


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example; the first ``prompt_length`` are the prompt and carry no loss."""

    input_ids: tuple[int, ...]
    prompt_length: int
    kind: str


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Read examples from a UTF-8 JSON Lines file, in file order.

    Each line is an object with the strings ``prompt``, ``completion`` and ``kind`` ("harmful" or
    "harmless"; "benign" means harmless) and, if wanted, ``split`` ("train" or "held_out"); other
    fields are ignored, and so are blank lines.  If no line has a split, every third example of
    each kind is held out; if only some have one, the others are for training.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is malformed or there is no example; the message starts with
            ``file:line:`` and names the field, what was expected and what came.
    """
    with open(path, "rb") as stream:
        return _parse(stream.read(), os.fspath(path))


def builtin_examples() -> list[Example]:
    """The 240 examples that come with the package: 120 pairs of a harmful and a like harmless one.

    80 pairs are for training and 40 held out; both splits cover the same topics.
    """
    name = "instructions.jsonl"
    return _parse((resources.files("zo_kernels") / "data" / name).read_bytes(), name)


def builtin_utility_text() -> str:
    """About 1,300 words of plain English prose (ASCII), to measure perplexity on."""
    return (resources.files("zo_kernels") / "data" / "utility.txt").read_text(encoding="ascii")


def select(
    examples: Sequence[Example], *, kind: str | None = None, split: str | None = None
) -> list[Example]:
    """The examples of one kind and of one split, in order; None stands for any.

    Raises ValueError for a kind or a split that does not exist (not for an empty result).
    """
    if kind is not None and kind not in _KINDS:
        raise ValueError(f"kind: expected one of {sorted(_KINDS)} or None, got {kind!r}")
    if split is not None and split not in _SPLITS:
        raise ValueError(f"split: expected one of {list(_SPLITS)} or None, got {split!r}")
    wanted = None if kind is None else _KINDS[kind]
    return [e for e in examples if wanted in (None, e.kind) and split in (None, e.split)]


def json_rows(data: bytes, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of JSON Lines with their places, ``name:line``; blank lines are left out.

    Raises ValueError, which names the place, for a line that is no JSON object in UTF-8.
    """
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(raw.decode("utf-8"))
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise ValueError(
                f"{where}: whole line: expected a JSON object in UTF-8, got {raw[:40]!r} ({error})"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: whole line: expected a JSON object, got {raw[:40]!r}")
        yield where, row


def _parse(data: bytes, name: str) -> list[Example]:
    """Parse JSON Lines; ``name`` is what errors call the file."""
    examples: list[Example] = []
    any_split = False
    for where, row in json_rows(data, name):
        prompt, completion = (text_field(row, f, where) for f in ("prompt", "completion"))
        kind = _choice(row, "kind", tuple(_KINDS), where)
        split = TRAIN
        if "split" in row:
            any_split = True
            split = _choice(row, "split", _SPLITS, where)
        examples.append(Example(prompt, completion, _KINDS[kind], split))
    if not examples:
        raise ValueError(f"{name}:1: whole file: expected at least one example, got none")
    return examples if any_split else _hold_out_thirds(examples)


def _got(row: Mapping[str, Any], field: str) -> str:
    """Say what a row holds in a field, for an error message."""
    return f"{row[field]!r}" if field in row else "no such field"


def text_field(row: Mapping[str, Any], field: str, where: str) -> str:
    """The non-blank string in a field, unchanged; ValueError names the place and the field."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{where}: field {field!r}: expected a non-empty string, got {_got(row, field)}"
        )
    return value


def _choice(row: Mapping[str, Any], field: str, choices: tuple[str, ...], where: str) -> str:
    """The string in a field, which must be one of ``choices``."""
    value = row.get(field)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{where}: field {field!r}: expected one of {list(choices)}, got {_got(row, field)}"
        )
    return value


def _hold_out_thirds(examples: Sequence[Example]) -> list[Example]:
    """Move the 3rd, 6th, 9th, ... example of each kind to the held-out split."""
    seen = dict.fromkeys((HARMFUL, HARMLESS), 0)
    result = []
    for example in examples:
        seen[example.kind] += 1
        third = seen[example.kind] % 3 == 0
        result.append(replace(example, split=HELD_OUT) if third else example)
    return result


def render(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a single user turn up to where the assistant's answer begins.

    The tokenizer's own chat template is applied with ``add_generation_prompt=True``; a system
    turn that it inserts by itself (as SmolLM2's does) stays, since that is what users deploy.

    FALLBACK: a tokenizer without a chat template gets the plain text ``User: PROMPT``, a newline
    and ``Assistant:`` (see ``FALLBACK_FORMAT``), tokenised with the tokenizer's usual leading
    special tokens; a trailing end-of-sequence token is dropped.
    """
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        out = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    else:
        out = tokenizer(FALLBACK_FORMAT.format(prompt=prompt))
    # Depending on version and tokenizer this is a mapping or a list, nested or flat.
    ids = out["input_ids"] if isinstance(out, Mapping) else out
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if ids and isinstance(ids[0], list):
        ids = ids[0]
    if not getattr(tokenizer, "chat_template", None) and ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]
    return [int(i) for i in ids]


def encode(tokenizer: Any, examples: Sequence[Example], *, max_length: int = 512) -> list[Encoded]:
    """Prompt ids, completion ids and the end-of-sequence id of each example.

    The completion is tokenised by itself (after one space where ``render`` falls back to the
    plain format), so the prompt's ids do not depend on it.  Over ``max_length`` tokens it is cut
    from the right, end-of-sequence id included: a cut answer has not ended.

    Raises ValueError if the tokenizer has no end-of-sequence token, an example has no completion,
    or a prompt is empty or leaves no room for at least one token of the completion.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("tokenizer: expected an eos_token_id, got None")
    lead = "" if getattr(tokenizer, "chat_template", None) else " "
    result = []
    for number, example in enumerate(examples):
        if not example.completion:
            raise ValueError(
                f"example {number}: expected a completion, got none: {example.prompt[:60]!r}"
            )
        prompt = render(tokenizer, example.message)
        if not 0 < len(prompt) < max_length:
            raise ValueError(
                f"example {number}: expected a prompt of 1 to {max_length - 1} tokens "
                f"(max_length {max_length}), got {len(prompt)}: {example.prompt[:60]!r}"
            )
        answer = tokenizer(lead + example.completion, add_special_tokens=False)["input_ids"]
        ids = (*prompt, *(int(i) for i in answer), int(eos))[:max_length]
        result.append(Encoded(ids, len(prompt), example.kind))
    return result


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's, else its end token (labels are masked by length)."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def collate(
    encoded: Sequence[Encoded], *, pad_id: int, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Pad examples on the right to one batch.

    Returns ``input_ids``, ``attention_mask`` and ``labels``, each int64 [batch, longest].  Labels
    repeat the ids of the completion and are -100 elsewhere.  What is padding is known from the
    lengths: in many models the padding id is also the end-of-sequence id, which must be learnt.

    Raises ValueError for an empty batch or a ``pad_id`` that is not an integer >= 0.
    """
    if not encoded:
        raise ValueError("encoded: expected at least one example, got none")
    if not isinstance(pad_id, int) or pad_id < 0:
        raise ValueError(f"pad_id: expected an integer >= 0, got {pad_id!r}")
    width = max(len(e.input_ids) for e in encoded)
    ids, mask, labels = [], [], []
    for e in encoded:
        size, gap = len(e.input_ids), width - len(e.input_ids)
        ids.append([*e.input_ids, *[pad_id] * gap])
        mask.append([1] * size + [0] * gap)
        answer = e.input_ids[e.prompt_length :]
        labels.append([*[IGNORED] * e.prompt_length, *answer, *[IGNORED] * gap])
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {k: torch.tensor(v, dtype=torch.int64, device=device) for k, v in rows.items()}


def batch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of ``range(count)``: a pure function of the arguments on every machine."""
    # Sorting by a hash needs no generator state and does not change between library versions.
    keys = [hashlib.blake2b(f"{seed}:{epoch}:{i}".encode()).digest() for i in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def batch_stream(
    encoded: Sequence[Encoded],
    *,
    batch_size: int,
    seed: int,
    pad_id: int,
    device: torch.device | str | None = None,
    start: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Endless batches (see ``collate``) from batch number ``start`` on.

    Batch number b is a pure function of (encoded, batch_size, seed, b): a run resumed with
    ``start=b`` sees what the uninterrupted run saw.  Epochs are permuted by ``batch_order`` and
    joined end to end, so a batch may cross from one into the next and all have ``batch_size``.

    Raises ValueError (at once, not at the first batch) for no examples, a ``batch_size`` below 1
    or a ``start`` below 0.
    """
    if not encoded:
        raise ValueError("encoded: expected at least one example, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected >= 1, got {batch_size}")
    if start < 0:
        raise ValueError(f"start: expected >= 0, got {start}")

    def batches() -> Iterator[dict[str, Tensor]]:
        known, order = -1, []
        for number in count_from(start):
            rows = []
            for position in range(number * batch_size, (number + 1) * batch_size):
                epoch, place = divmod(position, len(encoded))
                if epoch != known:
                    known, order = epoch, batch_order(len(encoded), seed=seed, epoch=epoch)
                rows.append(encoded[order[place]])
            yield collate(rows, pad_id=pad_id, device=device)

    return batches()


def completion_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross entropy per completion token of a batch: scalar, float32, nats.

    Logits are taken to float32 before the softmax whatever the model's dtype.  Gradients flow if
    the caller's grad mode allows it.  Raises as ``completion_losses`` does.
    """
    losses, counts = _token_losses(model, batch)
    return losses.sum() / counts.sum()


def completion_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross entropy per completion token of each example: float32 [batch], nats.

    Raises ValueError if an example has no completion token or one at position 0, and
    RuntimeError if the model returns logits of another shape than it was asked for.
    """
    losses, counts = _token_losses(model, batch)
    return losses.sum(dim=1) / counts


class _Rows(Tensor):
    """Positions of all sequences of a batch, flat: states[:, rows, :] is [1, rows, hidden].

    Models take ``logits_to_keep`` as an index of the length alone, so that the prompts' logits
    beside the first completion of a batch would be computed and thrown away.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.__getitem__ or isinstance(args[0], cls):
            return super().__torch_function__(func, types, args, kwargs or {})
        states, index = args
        index = index if isinstance(index, tuple) else (index,)
        others = index[:1] + index[2:]
        if not others or any(other != slice(None) for other in others) or len(index) > 3:
            raise RuntimeError(
                "logits_to_keep: expected a model that takes states[:, logits_to_keep, :], got one "
                f"with {len(index)} indices: {', '.join(map(repr, index))}"
            )
        rows = index[1].as_subclass(Tensor).to(states.device)  # a head may lie on another GPU
        return states.flatten(0, 1)[rows][None]


def _token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses float32 [batch, positions] (0 outside completions) and token counts [batch]."""
    labels = batch["labels"]
    wanted = labels != IGNORED
    counts = wanted.sum(dim=1)
    # One transfer for both numbers, before the model's work is queued on an accelerator.
    first, fewest = torch.stack((wanted.any(dim=0).int().argmax(), counts.min())).tolist()
    if fewest < 1 or first < 1:
        raise ValueError(
            "labels: expected a completion in every row, starting after position 0, got "
            f"{counts.tolist()} completion tokens, the first at position {first}"
        )
    # The logits at position t predict token t + 1.
    following = F.pad(wanted[:, 1:], (0, 1))
    accepted = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = following.flatten().nonzero()[:, 0].as_subclass(_Rows)
    if "use_cache" in accepted:
        extra["use_cache"] = False
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **extra
    ).logits
    expected = (1, int(counts.sum())) if "logits_to_keep" in extra else tuple(labels.shape)
    if logits.dim() != 3 or tuple(logits.shape[:2]) != expected:
        raise RuntimeError(
            f"logits: expected [{expected[0]}, {expected[1]}, vocabulary], got {list(logits.shape)}"
        )
    logits = logits[0] if "logits_to_keep" in extra else logits[following]
    losses = logits.new_zeros(labels.shape, dtype=torch.float32)
    losses[following] = F.cross_entropy(logits.float(), labels[wanted], reduction="none")
    return losses, counts
