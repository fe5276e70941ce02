"""Which blocks each rule chooses, by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, bits, same_bits, tiny_encoded, tiny_model, tiny_tokenizer

from zo_kernels.blocks import decoder_blocks, linear_weights
from zo_kernels.chat import batch_order, completion_loss
from zo_kernels.refine.objective import Objective, fixed_batches
from zo_kernels.refine.scores import ScoreConfig
from zo_kernels.refine.scoring import score
from zo_kernels.refine.selection import RULES, saliencies, select_blocks

LAYERS = 4


def objective_of(model, size=2):
    return Objective(model, fixed_batches(model, tiny_tokenizer(), tiny_encoded(), size))


def by_block(model, values):
    """Sums of values by parameter name over each decoder block."""
    return [
        sum(float(value) for name, value in values.items() if name.startswith(f"{block}."))
        for block in decoder_blocks(model)
    ]


def greatest(values, count):
    return tuple(sorted(torch.tensor(values).topk(count).indices.tolist()))


@pytest.mark.parametrize("name", CONFIGS)
def test_snip_is_the_sum_of_weight_times_gradient(name):
    """Against autograd by hand, on one batch of all examples; the model is left as it was."""
    model = tiny_model(name, layers=LAYERS)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    trainable, before = [p.requires_grad for p in model.parameters()], bits(model)
    found = saliencies(model, objective_of(model))
    chosen = select_blocks(model, "snip", 2, objective=objective_of(model))
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert same_bits(model, before) and all(p.grad is None for p in model.parameters())

    model.requires_grad_(True)
    completion_loss(model, objective_of(model, size=4).batches[0]).backward()
    with torch.no_grad():
        products = {n: (w * w.grad).double().abs().sum() for n, w in linear_weights(model).items()}
    expected = by_block(model, products)
    assert found == pytest.approx(expected, rel=1e-4) and min(found) > 0
    assert chosen == greatest(expected, 2)


def test_snip_takes_weights_that_the_loss_does_not_read_for_nothing():
    """An expert that no token chose, a failing objective: no error, and requires_grad is back."""
    model = tiny_model("llama", layers=2)
    block = model.model.layers[1]
    block.forward = lambda hidden, **options: hidden
    assert saliencies(model, objective_of(model))[1] == 0.0
    block.forward = lambda *_, **__: 1 / 0
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ZeroDivisionError):
        saliencies(model, objective_of(model))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_magnitude_is_the_mean_of_absolute_weights(dtype):
    """Not their sum, and of linear weights alone: not of norms, nor of a bias."""
    model = tiny_model("qwen2", dtype, layers=LAYERS)
    blocks = model.model.layers
    with torch.no_grad():
        for block, factor in zip(blocks, (1.2, 1.0, 2.0, 0.5), strict=True):
            for linear in (block.mlp.up_proj, block.self_attn.q_proj):
                linear.weight.mul_(factor)
        blocks[3].input_layernorm.weight.fill_(1e3)
        blocks[3].self_attn.q_proj.bias.fill_(1e3)
        # Fewer weights of the same mean: by its sum the block would be behind the next.
        blocks[0].mlp.gate_proj = torch.nn.Linear(32, 4, bias=False)
        blocks[0].mlp.gate_proj.weight.copy_(blocks[1].mlp.gate_proj.weight[:4])
        model.to(dtype)
    weights = linear_weights(model)
    sums = by_block(model, {n: float(w.detach().double().abs().sum()) for n, w in weights.items()})
    sizes = by_block(model, {n: w.numel() for n, w in weights.items()})
    means = [total / size for total, size in zip(sums, sizes, strict=True)]
    for count in range(1, LAYERS + 1):
        assert select_blocks(model, "magnitude", count) == greatest(means, count)
    assert select_blocks(model, "magnitude", 2) == (0, 2) != greatest(sums, 2)


def test_random_is_addressed():
    """A pure function of the seed, nested in the count, that reaches every block alike."""
    model = tiny_model("llama", layers=LAYERS)
    state = torch.random.get_rng_state()
    seen = [0] * LAYERS
    for seed in range(200):
        chosen = select_blocks(model, "random", 2, seed=seed)
        assert chosen == select_blocks(model, "random", 2, seed=seed) == tuple(sorted(chosen))
        assert chosen == tuple(sorted(batch_order(LAYERS, seed=seed, epoch=0)[:2]))
        assert set(chosen) <= set(select_blocks(model, "random", 3, seed=seed))
        for number in chosen:
            seen[number] += 1
    # Binomial with half a chance: 100 +- 7 each.
    assert all(abs(count - 100) < 4 * 50**0.5 for count in seen)
    assert torch.equal(state, torch.random.get_rng_state())


def test_robust_takes_the_scores_and_all_takes_all():
    model = tiny_model("llama", layers=LAYERS)
    config = ScoreConfig(selected=2, draws=2, max_draws=2)
    scores = score(model, tiny_tokenizer(), tiny_encoded(), config)
    values = [block.score for block in scores.blocks]
    assert select_blocks(model, "robust", 2, scores=scores) == scores.selected()
    for count in range(1, LAYERS + 1):
        assert select_blocks(model, "robust", count, scores=scores) == greatest(values, count)
    assert select_blocks(model, "all", 0) == (0, 1, 2, 3)


def test_what_a_rule_lacks_is_named():
    model = tiny_model("llama", layers=LAYERS)
    with pytest.raises(ValueError, match=r"rule: expected one of .*, got 'best'"):
        select_blocks(model, "best", 1)
    for rule in set(RULES) - {"all"}:
        for count in (0, LAYERS + 1):
            with pytest.raises(
                ValueError, match=f"count: expected 1 to 4 decoder blocks, got {count}"
            ):
                select_blocks(model, rule, count)
    with pytest.raises(ValueError, match="rule: expected an objective for 'snip', got none"):
        select_blocks(model, "snip", 1)
    with pytest.raises(ValueError, match=r"scores: expected those of 4 decoder blocks .* got none"):
        select_blocks(model, "robust", 1)
    other = score(
        tiny_model("llama"), tiny_tokenizer(), tiny_encoded(),
        ScoreConfig(selected=1, draws=1, max_draws=1),
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected those of 4 decoder blocks for 'robust', got 2"):
        select_blocks(model, "robust", 1, scores=other)
