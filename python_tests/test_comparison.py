"""Paired tests, intervals and sentences, against other ways to compute them and known truths."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from tiny_records import in_blocks, made_up

from zo_kernels.robustness import statistics
from zo_kernels.robustness.comparison import compare_records, difference, verdict
from zo_kernels.robustness.metrics import METRICS, bounds, items, seed_means, summary


def test_mcnemar() -> None:
    """The binomial tail of the discordant pairs, by hand."""
    assert statistics.mcnemar(2, 10) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert statistics.mcnemar(0, 0) == statistics.mcnemar(4, 4) == 1.0


def test_sign_flip() -> None:
    """All sign patterns of few differences; the t test's p of many, when these are normal."""
    assert statistics.sign_flip(np.array([1.0, 2, 3]), seed=0) == 0.25
    assert statistics.sign_flip(np.array([0.0, 1.0]), seed=0) == 1.0
    draws = np.random.Generator(np.random.Philox(5)).normal(0.3, 1.0, 60)
    p = statistics.sign_flip(draws, seed=1)
    assert p == pytest.approx(scipy.stats.ttest_1samp(draws, 0).pvalue, abs=0.01)
    assert p == statistics.sign_flip(draws, seed=1) != statistics.sign_flip(draws, seed=2)


def test_sign_flip_of_no_effect_is_uniform() -> None:
    generator = np.random.Generator(np.random.Philox(6))
    p = [statistics.sign_flip(generator.normal(size=9), seed=0) for _ in range(200)]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_interval_of_one_draw() -> None:
    """The normal interval of a mean of many; of a rate the exact one."""
    generator = np.random.Generator(np.random.Philox(7))
    values = generator.normal(2.0, 1.0, (1, 1, 400))
    low, high = statistics.interval(values, rate=False, seed=0)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    assert (low, high) == statistics.interval(values, rate=False, seed=0)
    assert (low, high) != statistics.interval(values, rate=False, seed=1)
    all_of_them = statistics.interval(np.ones((1, 1, 16)), rate=True, seed=0)
    assert all_of_them == pytest.approx((0.025 ** (1 / 16), 1.0))
    assert statistics.interval(np.ones((1, 3, 16)), rate=True, seed=0) == all_of_them


def test_interval_of_several_draws() -> None:
    """Where only the draws differ it is Student's of their means, where only prompts, of theirs."""
    draws = np.array([1.0, 2.0, 4.0])
    by_draws = statistics.crossed(np.repeat(draws[:, None], 50, axis=1))
    exact = scipy.stats.ttest_1samp(draws, 0)
    assert by_draws[2] == pytest.approx(exact.pvalue)
    assert by_draws[:2] == pytest.approx(tuple(exact.confidence_interval()))
    prompts = np.random.Generator(np.random.Philox(8)).normal(0.2, 1.0, 30)
    by_prompts = statistics.crossed(np.repeat(prompts[None], 3, axis=0))
    exact = scipy.stats.ttest_1samp(prompts, 0)
    assert by_prompts[2] == pytest.approx(exact.pvalue)
    assert by_prompts[:2] == pytest.approx(tuple(exact.confidence_interval()))
    assert statistics.crossed(np.full((2, 3), 0.5)) == (0.5, 0.5, 1e-9)
    assert statistics.crossed(np.zeros((2, 3))) == (0.0, 0.0, 1.0)
    low, high = statistics.interval(np.array([[[1, 1, 1], [1, 1, 0.0]]]), rate=True, seed=0)
    assert 0 <= low < high == 1.0


@pytest.mark.parametrize("draws", [2, 3, 5])
def test_few_draws_do_not_make_chance_significant(draws: int) -> None:
    """A draw that moves all prompts together: false alarms as often as is said, not one in four."""
    generator = np.random.Generator(np.random.Philox(draws))
    alarms = 0
    for _ in range(300):
        d = generator.normal(size=(1, draws, 1)) + generator.normal(size=(1, draws, 60))
        found = statistics.compare(np.zeros_like(d), d, rate=False, seed=0)
        assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
        alarms += found.p_value < 0.05
    assert alarms <= 27  # of 300 at 5 %: 15 expected, 28 or more with a chance of 0.001


@pytest.mark.parametrize(
    ("seeds", "draws", "seed_shift", "other", "mean", "stated"),
    [
        (3, 5, 1.0, 0.0, 0.0, 0.047),
        (5, 5, 1.0, 0.0, 0.0, 0.047),
        (3, 1, 1.0, 0.0, 0.0, 0.045),
        (5, 1, 1.0, 0.0, 0.0, 0.045),
        (3, 5, 1.0, 1.0, 0.0, 0.017),
        (5, 5, 1.0, 1.0, 0.0, 0.025),
        (3, 5, 0.0, 0.0, 0.0, 0.0005),
        (3, 5, 1.0, 0.0, 2.0, 0.46),
        (5, 5, 1.0, 0.0, 2.0, 0.89),
        (3, 5, 1.0, 0.0, 3.0, 0.74),
        (5, 5, 1.0, 0.0, 3.0, 0.997),
    ],
)
def test_rates_of_alarm_that_are_stated(
    seeds: int, draws: int, seed_shift: float, other: float, mean: float, stated: float
) -> None:
    """A training run that moves all draws and prompts together: chance is not a finding.

    `other` is what draws and prompts give the mean's standard deviation, relative to the seeds.
    """
    generator = np.random.Generator(np.random.Philox(100 * seeds + draws))
    cases, prompts, found = 300, 40, 0
    for _ in range(cases):
        values = mean + seed_shift * generator.normal(size=(seeds, 1, 1))
        values = values + other * (draws / seeds) ** 0.5 * generator.normal(size=(1, draws, 1))
        values = values + other * (prompts / seeds) ** 0.5 * generator.normal(size=(1, 1, prompts))
        low, high, p = statistics.crossed(values + generator.normal(size=(seeds, draws, prompts)))
        assert (p < 0.05) == (not low <= 0 <= high)
        found += p < 0.05
    least, most = scipy.stats.binom.ppf((0.0005, 0.9995), cases, stated)
    assert least <= found <= most


def test_a_model_that_exists_once_meets_each_training_seed() -> None:
    generator = np.random.Generator(np.random.Philox(9))
    once, seeds = generator.normal(size=(1, 5, 40)), generator.normal(size=(3, 5, 40))
    found = statistics.compare(once, seeds, rate=False, seed=0)
    assert found == statistics.compare(np.repeat(once, 3, axis=0), seeds, rate=False, seed=0)
    assert (found.training_seeds, found.draws, found.test) == (3, 5, "crossed-t")
    back = statistics.compare(seeds, once, rate=False, seed=0)
    assert (back.mean, back.low, back.p_value) == pytest.approx(
        (-found.mean, -found.high, found.p_value)
    )
    # One draw of several seeds: each seed's mean is a value of Student's test where they outweigh.
    by_seed = np.array([1.0, 2.0, 4.0])[:, None, None] + np.zeros((3, 1, 40))
    found = statistics.compare(np.zeros((1, 1, 40)), by_seed, rate=False, seed=0)
    exact = scipy.stats.ttest_1samp([1.0, 2.0, 4.0], 0)
    assert found.p_value == pytest.approx(exact.pvalue) and found.test == "crossed-t"
    for other in (np.zeros((2, 5, 40)), np.zeros((3, 4, 40)), np.zeros((5, 40))):
        with pytest.raises(ValueError, match="same training seeds, got values of shapes"):
            statistics.compare(seeds, other, rate=False, seed=0)
    with pytest.raises(ValueError, match="at least 2 values"):
        statistics.crossed(np.zeros((1, 1, 1)))


def test_compare() -> None:
    a, b = [[[0, 0, 1, 1, 0, 0, 0, 0]]], [[[1, 1, 1, 0, 1, 1, 1, 1]]]
    found = statistics.compare(a, b, rate=True, seed=0)
    assert (found.mean, found.only_a, found.only_b) == (5 / 8, 1, 6)
    assert (found.test, found.prompts, found.draws, found.training_seeds) == ("mcnemar", 8, 1, 1)
    assert found.p_value == statistics.mcnemar(1, 6)
    units = np.array(b[0][0]) - np.array(a[0][0])
    assert found.effect == pytest.approx(units.mean() / units.std(ddof=1))
    assert statistics.compare([a[0] * 2], [b[0] * 2], rate=True, seed=0).test == "crossed-t"
    same = statistics.compare(a, a, rate=True, seed=0)
    assert (same.low, same.high) == pytest.approx((0.025 ** (1 / 8) - 1, 1 - 0.025 ** (1 / 8)))
    all_of_them = statistics.compare([[[1] * 8] * 2], [[[0] * 8] * 2], rate=True, seed=0)
    assert all_of_them.low == -1.0 and all_of_them.high == pytest.approx(-(0.025 ** (1 / 8)))
    assert (all_of_them.test, all_of_them.p_value) == ("mcnemar", 2 / 2**8)
    wide = statistics.compare([[[0] * 8] * 2], [[[1] * 8, [0] + [1] * 7]], rate=True, seed=0)
    assert wide.high == 1.0 > wide.low > 0
    rounding = statistics.compare(
        [[[0.1] * 9, [0.3] * 9, [0.1] * 9]],
        [[[0.4] * 9, [0.6] * 9, [0.3] * 9]],
        rate=False,
        seed=0,
    )
    assert rounding.effect is None  # all prompts alike but for the last bits
    loss = statistics.compare([[[1.0, 2.0]]], [[[1.0, 2.0]]], rate=False, seed=0)
    assert (loss.p_value, loss.effect, loss.only_a, loss.test) == (1.0, None, None, "sign-flip")
    with pytest.raises(ValueError, match="same prompts"):
        statistics.compare(a, [[[1, 0]]], rate=True, seed=0)
    with pytest.raises(ValueError, match="zeros and ones"):
        statistics.compare([[[0.5]]], [[[1]]], rate=True, seed=0)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 2, 3), (2, 3, 3)])
def test_alike_differences_of_a_rate_are_as_many_as_there_are_prompts(shape) -> None:
    """More seeds and draws that show no spread make three prompts no surer."""
    found = statistics.compare(np.zeros(shape), np.ones(shape), rate=True, seed=0)
    assert (found.test, found.p_value) == ("mcnemar", statistics.mcnemar(0, 3))
    assert found.p_value == 0.25
    none = statistics.compare(np.ones(shape), np.ones(shape), rate=True, seed=0)
    assert (none.test, none.p_value) == ("mcnemar", 1.0)


def test_items_and_bounds() -> None:
    rows = [r for r in made_up("a", 0.0) if r["family"] == "w0.05"][::-1]
    found = items(rows, METRICS["refusal_loss"])
    assert found == pytest.approx(np.array([[[1.4, 1.5, 1.6], [1.5, 1.6, 1.7], [1.6, 1.7, 1.8]]]))
    # A prompt without a value in any draw is left out; one without in some draws spoils the mean.
    assert items(rows, METRICS["harmless_loss"]).tolist() == [[[2.0]] * 3]
    rows[0]["harmless_losses"] = [None, None]
    assert items(rows, METRICS["harmless_loss"]) is None
    assert bounds(rows, METRICS["harmless_loss"]) == (None, None)
    low, high = bounds(rows, METRICS["perplexity"])
    assert low < np.exp(3.1) < high
    rows[1]["utility_losses"], rows[2]["utility_losses"] = [10.0, 1000.0], [3.0, 4.0]
    assert bounds(rows, METRICS["perplexity"])[1] == np.inf


def test_compare_records() -> None:
    a, b = made_up("base", 0.0), made_up("new", -0.2)
    rows = {(r["family"], r["metric"]): r for r in compare_records(a, list(reversed(b)))}
    loss = rows["w0.1", "refusal_loss"]
    # Differences -0.2, -0.22, -0.24 in draws 0, 1, 2.
    assert loss["mean"] == pytest.approx(-0.22) and (loss["draws"], loss["prompts"]) == (3, 3)
    exact = scipy.stats.ttest_1samp([-0.2, -0.22, -0.24], 0)
    assert loss["p_value"] == pytest.approx(exact.pvalue) and loss["test"] == "crossed-t"
    assert (loss["low"], loss["high"]) == pytest.approx(tuple(exact.confidence_interval()))
    rate = rows["clean", "refusal_rate"]
    assert (rate["only_a"], rate["only_b"], rate["test"]) == (1, 0, "mcnemar")
    assert rate["mean"] == pytest.approx(-1 / 3)
    assert rows["int8", "harmless_loss"]["prompts"] == 1
    assert ("clean", "divergence") not in rows and ("int8", "divergence") in rows
    assert "Refusal rate as it is: the difference -33.3 [" in rate["sentence"]
    assert "is not significant (McNemar's test, p 1.000" in rate["sentence"]
    assert "under activation noise 0.02" in rows["a0.02", "refusal_loss"]["sentence"]
    assert "3 prompts, 3 draws" in loss["sentence"]
    assert "2 windows of text" in rows["int4", "perplexity"]["sentence"]
    found = sum(bool(row["significant"]) for row in rows.values())
    assert f"{found} of {len(rows)} differences are significant" in verdict(
        list(rows.values()), {"base": "Base", "new": "New"}
    )


def test_what_is_significant_is_said() -> None:
    """Twenty prompts that all lose 0.2 under weight noise; all else is equal."""

    def many(label: str, gain: float) -> list[dict]:
        records = made_up(label, 0.0)
        for record in records:
            by = gain if record["kind"] == "weight_noise" else 0.0
            record["refusal_losses"] = [1.0 + 0.01 * i - by * (1 + i / 50) for i in range(20)]
        return records

    rows = compare_records(many("a", 0.0), many("b", 0.2))
    found = [r for r in rows if r["significant"]]
    assert [(r["family"], r["metric"]) for r in found] == [
        ("w0.05", "refusal_loss"),
        ("w0.1", "refusal_loss"),
    ]
    assert "-0.238 [-0.24" in found[0]["sentence"]
    assert "nats per token is significant and better (t test over dr" in found[0]["sentence"]
    assert "2 of " in verdict(rows, {"a": "a", "b": "b"})
    assert "2 better, 0 worse" in verdict(rows, {"a": "a", "b": "b"})
    worse = compare_records(many("b", 0.2), many("a", 0.0))
    assert "0 better, 2 worse" in verdict(worse, {"a": "a", "b": "b"})


def trained(label: str, shifts: dict[int, float]) -> list[dict]:
    """An arm of several training seeds, each with its own shift of the refusal loss."""
    return [r for seed, shift in shifts.items() for r in made_up(label, shift, training_seed=seed)]


def test_arms_of_several_training_seeds() -> None:
    aligned = made_up("aligned", 0.0)
    focused = trained("focused", {2: -0.3, 0: -0.1, 1: -0.2})
    walk = trained("walk", {0: 0.1, 1: 0.2, 2: 0.0})
    rows = {(r["family"], r["metric"]): r for r in compare_records(aligned, focused[::-1])}
    quantized = rows["int4", "refusal_loss"]
    exact = scipy.stats.ttest_1samp([-0.1, -0.2, -0.3], 0)
    assert quantized["p_value"] == pytest.approx(exact.pvalue)
    assert (quantized["low"], quantized["high"]) == pytest.approx(
        tuple(exact.confidence_interval())
    )
    counts = (quantized["training_seeds"], quantized["draws"], quantized["prompts"])
    assert counts == (3, 1, 3)
    assert "t test over training seeds and prompts" in quantized["sentence"]
    assert quantized["sentence"].endswith("; 3 prompts, 3 training seeds).")
    noisy = rows["w0.1", "refusal_loss"]
    assert "t test over training seeds, draws and prompts, p" in noisy["sentence"]
    assert noisy["sentence"].endswith("; 3 prompts, 3 draws, 3 training seeds).")
    same = [r | {"significant": False} for r in rows.values()]
    assert "prompts, draws and training seeds do not tell" in verdict(
        same, {"aligned": "a", "focused": "f"}
    )
    # Two arms: seed by seed, here -0.2, -0.4 and -0.3, whatever the order of the records.
    rows = {(r["family"], r["metric"]): r for r in compare_records(walk[::-1], focused)}
    assert rows["clean", "refusal_loss"]["mean"] == pytest.approx(-0.3)
    exact = scipy.stats.ttest_1samp([-0.2, -0.4, -0.3], 0)
    assert rows["clean", "refusal_loss"]["p_value"] == pytest.approx(exact.pvalue)
    # One number that is not finite in one seed spoils the arm's, and is not left out.
    focused[-1] |= {"refusal_loss": None, "non_finite": ["refusal_loss"]}
    rows = {(r["family"], r["metric"]): r for r in compare_records(aligned, focused)}
    row = rows["int4", "refusal_loss"]
    assert row["mean"] is None and (row["training_seeds"], row["draws"]) == (3, 1)


def test_training_seeds_that_cannot_be_paired() -> None:
    aligned, arm = made_up("a", 0.0), trained("b", {0: 0.1, 1: 0.2})
    with pytest.raises(ValueError, match=r"same training seeds.* got \[0, 2\] and \[0, 1\]"):
        compare_records(trained("c", {0: 0.1, 2: 0.2}), arm)
    with pytest.raises(ValueError, match=r"same training seeds.* got \[0\] and \[0, 1\]"):
        compare_records(trained("c", {0: 0.1}), arm)
    with pytest.raises(ValueError, match="a training_seed in all records or in none"):
        compare_records(aligned, arm + made_up("b", 0.0))
    lost = next(r for r in arm if r["training_seed"] == 1 and r["draw"] == 2)
    with pytest.raises(ValueError, match=r"b, w0\.05: expected the same draws once each"):
        compare_records(aligned, [r for r in arm if r is not lost])
    with pytest.raises(ValueError, match="b, clean: expected the same draws once each"):
        compare_records(aligned, arm + arm[:1])
    assert compare_records(trained("c", {0: 0.1, 1: 0.1}), arm[::-1])


def test_summary_of_several_training_seeds() -> None:
    arm = trained("b", {0: 0.0, 1: 0.1, 2: 0.5})
    rows = [r for r in arm if r["family"] == "w0.1"]
    cell = summary(arm)["b"]["w0.1"]["refusal_loss"]
    # Each seed's mean over its draws: 2 + shift + 0.1 (1 + shift).
    means = [2.1, 2.21, 2.65]
    assert cell["mean"] == pytest.approx(np.mean(means)) and cell["low"] < np.mean(means)
    assert cell["std"] == pytest.approx(np.std(means, ddof=1))
    assert (cell["n"], cell["training_seeds"]) == (9, 3)
    assert seed_means(rows, METRICS["refusal_loss"]) == pytest.approx(dict(enumerate(means)))
    assert items(rows[::-1], METRICS["refusal_loss"]).shape == (3, 3, 3)
    assert items(rows[::-1], METRICS["refusal_loss"])[2, 1].tolist() == rows[7]["refusal_losses"]
    rows[4]["refusal_loss"] = None
    assert list(seed_means(rows, METRICS["refusal_loss"])) == [0, 2]


def test_what_cannot_be_compared() -> None:
    a, b = made_up("a", 0.0), made_up("b", 0.0)
    b[0]["refusal_losses"] = [None, 1.0, 1.0]
    row = next(r for r in compare_records(a, b) if r["metric"] == "refusal_loss")
    assert row["mean"] is None and row["significant"] is None and difference(row) == "n/a"
    assert "not compared" in row["sentence"]
    # Missing on both sides, of different prompts and of the same.
    for losses in ([1.0, 1.0, None], [None, 1.0, 1.0]):
        a[0] |= {"refusal_losses": losses, "refusal_loss": None, "non_finite": ["refusal_loss"]}
        row = next(r for r in compare_records(a, b) if r["metric"] == "refusal_loss")
        assert row["mean"] is None
    a[0] |= {"refusal_losses": [1.0, 1.0, None], "non_finite": []}
    row = next(r for r in compare_records(a, b) if r["metric"] == "refusal_loss")
    assert row["mean"] is None
    for arm, judge in ((a, "x"), (b, "y")):
        arm[0]["harmbench_model"] = judge
    with pytest.raises(ValueError, match="one harmbench_model to pair by"):
        compare_records(a, b)
    del a[0]["harmbench_model"], b[0]["harmbench_model"]
    for changes, message in (
        ({"prompts": "other"}, "equal prompts to pair by"),
        ({"noise_seed": 1}, "equal noise_seed"),
        ({"text": "other"}, "equal text"),
        ({"refusal": "other"}, "equal refusal"),
        ({"max_new_tokens": 9}, "equal max_new_tokens"),
        ({"family": "x"}, "common condition"),
        ({"draw": 0}, "same draws once each"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_records(a, made_up("b", 0.0, **changes))
    with pytest.raises(ValueError, match="one arm"):
        compare_records(a + b, b)


def test_summary() -> None:
    a, b = made_up("aligned", 0.0), made_up("refined", -0.2)
    b[-1]["refusal_loss"], b[-1]["non_finite"] = None, ["refusal_loss"]
    table = summary([*a, *b, *in_blocks("aligned", [0.5])])
    assert list(table) == ["aligned", "refined"]
    assert list(table["aligned"]) == ["clean", "w0.05", "w0.1", "a0.02", "int8", "int4"]
    cell = table["aligned"]["w0.05"]["perplexity"]
    pooled = (20.0 * 24.0 * 28.0) ** (1 / 3)  # exp of the mean loss
    assert (cell["mean"], cell["std"], cell["n"]) == (pytest.approx(pooled), 4.0, 3)
    cell = table["refined"]["int8"]["refusal_loss"]
    assert cell["mean"] == pytest.approx(0.8) and cell["std"] is None
    assert 0.7 <= cell["low"] < 0.8 < cell["high"] <= 0.9
    cell = table["refined"]["int4"]["refusal_loss"]
    assert (cell["mean"], cell["low"], cell["missing"], cell["non_finite"]) == (None, None, 1, 1)
