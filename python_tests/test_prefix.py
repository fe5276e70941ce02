"""Forwards that begin behind a decoder block: the bits of whole ones, for less."""

from __future__ import annotations

import itertools
import threading
from dataclasses import asdict

import pytest
import torch
from tiny_models import (
    CONFIGS,
    EXAMPLES,
    bits,
    block_calls,
    same_bits,
    tiny_encoded,
    tiny_model,
    tiny_tokenizer,
)

from zo_kernels.blocks import decoder_blocks, linear_weights
from zo_kernels.modes import MODES, Slot
from zo_kernels.modes.streamed import StreamedWeights
from zo_kernels.noise import model_streams
from zo_kernels.refine.config import RefineConfig
from zo_kernels.refine.objective import Objective, fixed_batches
from zo_kernels.refine.prefix import PrefixCache
from zo_kernels.refine.refiner import ZORefiner
from zo_kernels.refine.selection import saliencies

LAYERS = 3


def batches_of(model, size=2):
    return fixed_batches(model, tiny_tokenizer(), tiny_encoded(), size)


def noisy(model, block, scale=0.1):
    """The linear weights from a block on, under noise."""
    late = tuple(f"{name}." for name in list(decoder_blocks(model))[block:])
    streams = model_streams(model)
    slots = [Slot(n, w, streams[n]) for n, w in linear_weights(model).items() if n.startswith(late)]
    return StreamedWeights(slots, [scale] * len(slots), seed=3, direction=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_have_the_bits_of_whole_forwards(name, dtype):
    """Behind every block, of two batches, with noise in what follows; and forwards are saved."""
    model = tiny_model(name, dtype, layers=LAYERS)
    whole = Objective(model, batches_of(model))
    calls = block_calls(model)
    for record in range(LAYERS - 1):
        with noisy(model, record + 1):
            expected = [whole.batch_loss(n).detach() for n in range(2)]
        with PrefixCache(model, record=record) as prefix:
            objective = Objective(model, whole.batches, prefix=prefix)
            objective.check_prefix()
            before = list(calls)
            with noisy(model, record + 1), torch.no_grad():
                found = [objective.batch_loss(n) for n in range(2)]
        assert all(map(torch.equal, found, expected)), record
        done = [after - start for after, start in zip(calls, before, strict=True)]
        assert done == [0] * (record + 1) + [2] * (LAYERS - 1 - record)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefixes_advance_block_by_block(name):
    """As scoring goes through them: each block computes once, and losses stay as they are."""
    model = tiny_model(name, layers=LAYERS)
    expected = Objective(model, batches_of(model))()
    calls = block_calls(model)
    with PrefixCache(model) as prefix:
        objective = Objective(model, batches_of(model), prefix=prefix)
        for number in range(LAYERS):
            prefix.record = number
            objective.advance()
            prefix.record = None
        assert calls == [2] * LAYERS
        assert objective() == expected and calls == [2] * LAYERS
        prefix.clear()
        assert objective() == expected and calls == [4] * LAYERS


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("name", CONFIGS)
def test_refinement_has_the_same_bits_and_computes_less(name, mode):
    """In every mode: with two threads, in place, from copies; of two micro-batches."""
    found = []
    for reuse in (True, False):
        model = tiny_model(name, torch.bfloat16, layers=LAYERS)
        config = RefineConfig(
            steps=3, batch_size=2, accumulation=2, lr=0.1, eps=0.1, mode=mode, queries=2,
            layers=(2,), reuse_prefix=reuse, curvature_every=2,
        )  # fmt: skip
        calls = block_calls(model)
        records = ZORefiner(model, tiny_tokenizer(), config).run(EXAMPLES)
        found.append((model, [{**r, "seconds": 0} for r in records], calls))
    (model, records, calls), (other, others, all_calls) = found
    assert same_bits(model, bits(other))
    assert repr(records) == repr(others)  # of numbers the repr tells every bit
    assert not same_bits(model, bits(tiny_model(name, torch.bfloat16, layers=LAYERS)))
    whole = 3 * 2 * 4 + 2 * 2  # steps * micro-batches * evaluations, and two clean losses
    assert all_calls == [whole] * 3
    # Once per step and micro-batch, and whole forwards in the check of the first step.
    assert calls == [3 * 2, 3 * 2, whole + 2 * 2]


@pytest.mark.parametrize(
    ("parameters", "layers", "kept"),
    [("linear", None, None), ("linear", (1, 2), 0), ("linear", (0, 2), None), ("all", None, None),
     ("*layers.2.*", None, 1), ("*layers.2.*, lm_head*", None, None)],
)  # fmt: skip
def test_where_a_refinement_begins(parameters, layers, kept):
    """Behind the block before the first one that moves; what is outside of blocks moves all."""
    model = tiny_model("llama", layers=LAYERS)
    config = RefineConfig(parameters=parameters, layers=layers)
    prefix = ZORefiner(model, tiny_tokenizer(), config)._prefix
    assert (None if prefix is None else prefix.record) == kept


def patched(model, number, forward):
    """Another forward of a block: given the block's own and its arguments."""
    block = list(decoder_blocks(model).values())[number]
    own = block.forward
    block.forward = lambda *args, **kwargs: forward(own, *args, **kwargs)
    return block


def counting(model):
    """A last block that depends on how often it was called."""
    number = itertools.count(1)
    patched(model, 2, lambda own, *args, **kwargs: own(*args, **kwargs) * next(number))


def fresh_state(model):
    """A last block that takes what the first one left in this forward."""
    left = []
    patched(model, 0, lambda own, hidden, **k: (left.append(hidden), own(hidden, **k))[1])
    patched(model, 2, lambda own, hidden, **k: own(hidden + left.pop(), **k))


def stale_state(model):
    """A last block that takes what the first one left in its last forward: of another batch."""
    left = {}

    def first(own, hidden, **options):
        left["mean"] = hidden.mean()
        return own(hidden, **options)

    patched(model, 0, first)
    patched(model, 2, lambda own, hidden, **options: own(hidden + left["mean"], **options))


def writer(model):
    """A last block that writes into what it is given."""
    patched(model, 2, lambda own, hidden, **options: own(hidden.add_(1.0), **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (counting, "got a loss of .* instead of .* from a forward that begins behind block 1"),
        (fresh_state, r"got IndexError \(pop from empty list\) from a forward that begins"),
        (stale_state, "got a loss of .* instead of"),
        (writer, "the output of decoder block 1 was written in place by what follows it; turn"),
    ],
)  # fmt: skip
def test_models_whose_blocks_depend_on_more_are_refused(change, message):
    model = tiny_model("llama", layers=LAYERS)
    change(model)
    before, forwards = bits(model), [b.forward for b in decoder_blocks(model).values()]
    config = RefineConfig(steps=1, batch_size=2, accumulation=2, layers=(2,), lr=0.1)
    refiner = ZORefiner(model, tiny_tokenizer(), config)
    with pytest.raises(RuntimeError, match=message):
        refiner.run(EXAMPLES)
    assert same_bits(model, before) and refiner.optimizer.steps == 0
    assert [b.forward for b in decoder_blocks(model).values()] == forwards
    config = RefineConfig(**{**asdict(config), "reuse_prefix": False})
    assert len(ZORefiner(model, tiny_tokenizer(), config).run(EXAMPLES)) == 1


@pytest.mark.filterwarnings("ignore:ZOSGD. step 0 skipped")
def test_a_loss_that_is_not_finite_is_not_the_prefix_s():
    """The step is skipped; whether forwards can begin behind a block, the next loss tells."""
    model = tiny_model("llama", layers=LAYERS)
    weight = model.lm_head.weight.detach()
    before, weight[0, 0] = float(weight[0, 0]), torch.nan
    config = RefineConfig(steps=2, batch_size=2, layers=(2,), lr=0.1)
    refiner = ZORefiner(model, tiny_tokenizer(), config)
    checked = []

    def on_step(record):
        checked.append(refiner._prefix.checked)
        weight[0, 0] = before

    records = refiner.run(EXAMPLES, on_step=on_step)
    assert [r["skipped"] is None for r in records] == [False, True] == checked


def test_a_writer_is_noticed_after_the_check_too():
    model = tiny_model("llama", layers=LAYERS)
    objective = Objective(model, batches_of(model), prefix=(prefix := PrefixCache(model, 1)))
    writes = []
    patched(model, 2, lambda own, h, **k: own(h.add_(1.0) if writes else h, **k))
    with prefix:
        objective.check_prefix()
        writes.append(True)
        objective()
        with pytest.raises(RuntimeError, match="decoder block 1 was written in place"):
            objective()


def test_forwards_are_given_back():
    """After an exception, and where a block had a forward of its own (as accelerate's hooks)."""
    model = tiny_model("llama", layers=LAYERS)
    block = patched(model, 1, lambda own, *args, **kwargs: own(*args, **kwargs))
    mine, blocks = block.forward, list(decoder_blocks(model).values())
    objective = Objective(model, batches_of(model), prefix=(prefix := PrefixCache(model, 1)))

    class Broken(Exception):
        pass

    for error in (Broken, KeyboardInterrupt):
        with pytest.raises(error), prefix:
            objective()
            assert all("forward" in b.__dict__ for b in blocks) and block.forward is not mine
            raise error
        assert block.forward is mine
        assert [("forward" in b.__dict__) for b in blocks] == [False, True, False]
    # Where a forward fails behind the kept block, the next one is as ever.
    with prefix:
        expected = objective()
        own, blocks[2].mlp.forward = blocks[2].mlp.forward, lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            objective()
        blocks[2].mlp.forward = own
        assert objective() == expected
        with pytest.raises(ZeroDivisionError):
            prefix.advance("key", lambda: 1 / 0)
        assert objective() == expected


def test_forwards_outside_of_a_batch_are_as_ever():
    """Other batches, other objectives, other threads and forwards with gradients."""
    model = tiny_model("llama", layers=LAYERS)
    batches, others = batches_of(model), batches_of(model, size=4)
    expected = Objective(model, batches)(), Objective(model, others)()
    gradients = saliencies(model, Objective(model, batches))
    calls = block_calls(model)
    with PrefixCache(model, record=1) as prefix:
        mine = Objective(model, batches, prefix=prefix, name="mine")
        theirs = Objective(model, others, prefix=prefix, name="theirs")
        assert (mine(), theirs()) == expected == (mine(), theirs())
        assert calls == [3, 3, 6]
        assert Objective(model, batches)() == expected[0] and calls == [5, 5, 8]
        found = []
        with prefix.batch(mine.keys[0]):
            thread = threading.Thread(target=lambda: found.append(Objective(model, batches)()))
            thread.start()
            thread.join()
        assert found == [expected[0]] and calls == [7, 7, 10]
        assert saliencies(model, mine) == gradients and calls == [9, 9, 12]


def test_errors():
    model = tiny_model("llama", layers=LAYERS)
    for number in (-1, 3):
        with pytest.raises(ValueError, match=f"record: expected .* from 0 to 2, got {number}"):
            PrefixCache(model, record=number)
    with pytest.raises(ValueError, match="no decoder blocks"):
        PrefixCache(torch.nn.Linear(2, 2))
    with PrefixCache(model, record=1) as prefix:
        with pytest.raises(RuntimeError, match="the forward did not reach decoder block 1"):
            prefix.advance("key", lambda: None)
        loss = torch.ones(())
        with pytest.raises(RuntimeError, match="reuse_prefix: expected decoder blocks that depend"):
            prefix.check({"key": lambda: loss})  # runs no block
        assert not prefix.checked
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        Objective(model, [])
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        batches_of(model, size=0)
