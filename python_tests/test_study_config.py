"""What a study is asked for: the files that come along, and refusals that name the option."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from tiny_study import CONFIGS, run, small_config, write_files

from zo_kernels.pipeline.study_config import ARMS, Arm, StudyConfig
from zo_kernels.pipeline.study_file import read_study
from zo_kernels.refine.config import RefineConfig
from zo_kernels.refine.scores import ScoreConfig

FILES = sorted(CONFIGS.rglob("*.yaml"))


def test_all_files_are_here():
    names = {path.relative_to(CONFIGS).as_posix() for path in FILES}
    models = ("llama-3-8b-instruct", "qwen2-7b-instruct")
    assert names == {"tiny.yaml", "smollm2-135m.yaml", "stories260k.yaml"} | {
        f"{model}/{name}.yaml" for model in models for name in ("paper", "ours")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_files_that_come_along_are_read_in_full(path):
    """Each option of the file is in the configuration, and what it does not say is as ever."""
    written, config = yaml.safe_load(path.read_text()), read_study(path)
    for name in ("align", "score", "refine", "first_order", "evaluation"):
        section = getattr(config, name)
        for option, value in written.get(name, {}).items():
            wanted = tuple(value) if isinstance(value, list) else value
            assert getattr(section, option) == wanted
        for option in set(vars(section)) - set(written.get(name, {})):
            assert getattr(section, option) == getattr(type(section)(), option)
    assert config.seeds == tuple(written.get("seeds", (0, 1, 2)))
    arms = [arm if isinstance(arm, str) else arm["name"] for arm in written.get("arms", ARMS)]
    assert [arm.name for arm in config.arms] == arms
    where = written["model"] if "smollm2" in path.name else str(path.parent / written["model"])
    assert config.model == where


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_files_that_come_along_have_every_control_and_one_length(path):
    config = read_study(path)
    controls = {"more_fo", "fo_noise", "walk", "walk_robust", "zo_random", "zo_magnitude"}
    assert controls | {"zo_full", "zo_robust"} <= {arm.name for arm in config.arms}
    lengths = {part.max_length for part in (config.score, config.refine, config.evaluation)}
    assert len(lengths) == 1


def test_arms_of_a_file(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "model: base\nalign: none\nrefine: {lr: 1.0e-2}\nfirst-order: {lr: 0.5}\narms:\n"
        "  - zo_robust\n"
        "  - {name: zo_full, options: {mode: master8, held-out-every: 2}}\n"
        "  - {name: fo_noise, options: {lr: 0.25}}\n"
        "  - {name: late, kind: zo, options: {layers: [3, 4]}}\n"
        "  - {name: walk.late, kind: walk, like: late}\n"
    )
    config = read_study(path)
    assert config.align is None and config.model == str(tmp_path / "base")
    robust, full, noisy, late, walk = config.arms
    assert robust is ARMS["zo_robust"] and walk == Arm("walk.late", "walk", like="late")
    assert config.refinement(full, 7, 5, None) == RefineConfig(
        lr=1e-2, mode="master8", held_out_every=2, seed=7, steps=5
    )
    steps = config.first_order_steps(noisy, 7, 5)
    assert (steps.lr, steps.noise, steps.seed, steps.steps) == (0.25, 0.1, 7, 5)
    assert config.refinement(late, 7, 5, None).layers == (3, 4)


def test_numbers_that_yaml_reads_as_texts(tmp_path):
    """YAML wants a dot in front of an exponent."""
    path = tmp_path / "study.yaml"
    path.write_text(
        "model: base\nalign: {lr: 1e-3, optimizer: sgd}\nrefine: {lr: 2e-3, eps: match:1e-1}\n"
        "evaluation: {noise: [5e-2, 0.1]}\narms: [{name: a, kind: fo, options: {lr: 3e-4}}]\n"
    )
    config = read_study(path)
    assert (config.align.lr, config.refine.lr, config.evaluation.noise) == (1e-3, 2e-3, (0.05, 0.1))
    assert config.refine.eps == "match:1e-1" and config.arms[0].options == {"lr": 3e-4}


def test_arms_of_another_kind_have_but_the_name(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "model: base\nrefine: {eps: 0.25}\narms:\n"
        "  - {name: fo_noise, kind: zo}\n"
        "  - {name: zo_robust, kind: fo, options: {noise: eps, lr: 0.5}}\n"
        "  - {name: walk, kind: fo, options: }\n"
    )
    assert read_study(path).arms == (
        Arm("fo_noise", "zo"),
        Arm("zo_robust", "fo", options={"noise": "eps", "lr": 0.5}),
        Arm("walk", "fo"),
    )
    steps = read_study(path).first_order_steps(read_study(path).arms[1], 0, 1)
    assert (steps.noise, steps.lr) == (0.25, 0.5)


@pytest.mark.parametrize("text", ["", " null", " none", " ~"])
def test_a_model_that_is_aligned_already(text, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(f"align:{text}\nmodel: base\n")
    assert read_study(path).align is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", r"expected YAML"),
        ("- a", "expected a mapping of options with a model"),
        ("seeds: [1]", "expected a mapping of options with a model"),
        ("model: m\nsedes: [1]", r"expected options out of \[.*'seeds'.*\], got 'sedes'"),
        ("model: m\nalign: {stesp: 3}", r"align: expected options out of .*, got 'stesp'"),
        ("model: m\nalign: 3", "align: expected a mapping of options, got 3"),
        ("model: m\nalign: {steps: many}", r"align\.steps: expected int, got 'many'"),
        ("model: m\nalign: {steps: 0}", "align: steps: expected at least 1, got 0"),
        ("model: m\nalign: {lr: fast}", r"align\.lr: expected float, got 'fast'"),
        ("model: m\nalign: {lr: inf}", r"align\.lr: expected float, got 'inf'"),
        ("model: m\nalign: {steps: 1e3}", r"align\.steps: expected int, got '1e3'"),
        ("model: m\nscore: {rho: -1}", "score: rho: expected a positive number, got -1"),
        ("model: m\nscore: {reuse_prefix: 1}", r"score\.reuse_prefix: expected bool, got 1"),
        ("model: m\nrefine: {mode: magic}", "refine: mode: expected one of"),
        ("model: m\nrefine: {lr: nan}", "refine: lr: expected a number or 'auto', got 'nan'"),
        ("model: m\nrefine: {seed: 3}", r"refine\.seed: expected no such option in a study"),
        ("model: m\nrefine: {layers: [3]}", r"refine\.layers: expected no such option in a study"),
        ("model: m\nrefine: {seconds: 3}", r"refine\.seconds: expected none where arms have equal"),
        ("model: m\nfirst_order: {steps: 3}", r"first_order\.steps: expected no such option"),
        ("model: m\nfirst_order: {noise: -1}", "first_order: noise: expected at least 0, got -1"),
        ("model: m\nevaluation: {draws: 0}", "evaluation: draws: expected at least 1, got 0"),
        ("model: m\nevaluation: {max_prompts: 0}", "evaluation: max_prompts: expected >= 1"),
        ("model: m\nevaluation: {noise: [a]}", r"evaluation\.noise: expected tuple.*got \['a'\]"),
        ("model: m\nevaluation: {layers: [int4]}", r"evaluation\.layers: expected none in a study"),
        ("model: m\nseeds: []", "seeds: expected some, each once, got"),
        ("model: m\nseeds: [1, 2, 1]", r"seeds: expected some, each once, got \[1, 2, 1\]"),
        ("model: m\nseeds: [-1]", r"seeds: expected 0 <= seed < 2\*\*64, got -1"),
        ("model: m\nthreads: 0", "threads: expected at least 1, got 0"),
        ("model: m\nequal: luck", "equal: expected one of .*, got 'luck'"),
        ("model: m\nequal: seconds\narms: [more_fo]", "equal: expected a zeroth-order arm whose"),
        (
            "model: m\nequal: seconds\nrefine: {schedule: cosine}",
            r"refine\.schedule: expected 'constant' where arms end by their time",
        ),
        ("model: m\narms: zo_full", "arms: expected a list, got 'zo_full'"),
        ("model: m\narms: []", "arms: expected some, each once"),
        ("model: m\narms: [zo_ful]", r"arms: expected names out of .*, got 'zo_ful'"),
        ("model: m\narms: [zo_full, zo_full]", "arms: expected some, each once"),
        ("model: m\narms: [3]", "arms: expected names or mappings with a name, got 3"),
        ("model: m\narms: [{kind: zo}]", "arms: expected names or mappings with a name"),
        ("model: m\narms: [{name: base, kind: zo}]", "arms: expected .* other names than"),
        ("model: m\narms: [{name: a/b, kind: zo}]", "arms: expected names of letters.*got 'a/b'"),
        ("model: m\narms: [{name: a}]", r"arms\.a: expected kind among the options, got none"),
        ("model: m\narms: [{name: a, kind: x}]", r"arms\.a: expected a kind of .*, got 'x'"),
        ("model: m\narms: [{name: a, kind: zo, block: all}]", r"arms\.a: expected options out of"),
        ("model: m\narms: [{name: a, kind: zo, blocks: x}]", r"arms\.a: expected blocks out of"),
        ("model: m\narms: [{name: a, kind: fo, blocks: snip}]", r"arms\.a: .*none unless kind is"),
        ("model: m\narms: [{name: a, kind: fo, like: b}]", r"arms\.a: expected like: of a walk"),
        ("model: m\narms: [{name: a, kind: zo, options: {lr: no}}]", r"lr: expected float"),
        ("model: m\narms: [{name: a, kind: zo, options: {eps: -1}}]", "eps: expected a finite"),
        ("model: m\narms: [{name: a, kind: zo, options: {mode: x}}]", r"arms\.a: mode: expected"),
        ("model: m\narms: [{name: zo_full, options: 0}]", r"zo_full\.options: expected a mapping"),
        ("model: m\narms: [{name: a, kind: zo, options: [lr]}]", r"a\.options: expected a mapping"),
        ("model: m\narms: [{name: a, kind: fo, options: {noise: x}}]", "noise: expected float"),
        ("model: m\narms: [{name: a, kind: zo, options: {noise: eps}}]", r"\.options: expected op"),
        ("model: m\narms: [{name: a, kind: fo, options: {eps: 1}}]", r"arms\.a\.options: expected"),
        ("model: m\narms: [{name: a, kind: zo, options: {seed: 1}}]", r"arms\.a\.options\.seed: "),
        ("model: m\narms: [{name: a, kind: fo, options: {steps: 1}}]", r"arms\.a\.options\.steps"),
        (
            "model: m\narms: [{name: a, kind: zo, blocks: snip, options: {layers: [1]}}]",
            r"arms\.a\.options\.layers: expected no such option",
        ),
        ("model: m\narms: [walk]", r"arms\.walk: expected like: a zeroth-order arm.*'zo_full'"),
        ("model: m\narms: [{name: a, kind: walk}]", r"arms\.a: expected like: .* got None"),
        ("model: m\narms: [more_fo, {name: a, kind: walk, like: more_fo}]", r"arms\.a: expected"),
        (
            "model: m\narms: [zo_full, walk]\nrefine: {mode: mezo}",
            r"arms\.walk: expected like: an arm with a replay log, got 'zo_full' in mode 'mezo'",
        ),
        (
            "model: m\narms: [zo_full, {name: a, kind: walk, like: zo_full, options: {lr: 1}}]",
            r"arms\.a: expected no options of a walk",
        ),
        (
            "model: m\narms: [fo_noise]\nrefine: {relative_eps: false}",
            r"arms\.fo_noise: expected a relative eps, whose scale noise injection takes, got 0\.1",
        ),
    ],
)  # fmt: skip
def test_refusals_name_file_section_and_option(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)mine\.yaml: .*{message}"):
        read_study(path)


def test_configurations_made_by_hand_are_checked_too():
    config = StudyConfig(model="m")
    config.check()
    with pytest.raises(ValueError, match="seeds: expected some, each once"):
        replace(config, seeds=(1, 1)).check()
    assert config.forwards() == 2 * 200 * 8
    assert replace(config, refine=RefineConfig(queries=3, steps=2)).forwards() == 2 * 3 * 2 * 8


@pytest.mark.parametrize(
    ("arm", "changes", "message"),
    [
        (
            "zo_robust",
            {"score": ScoreConfig(selected=3)},
            r"score\.selected: expected at most the model's 2 decoder blocks, got 3",
        ),
        (
            Arm("late", "zo", options={"layers": (2,)}),
            {},
            r"arms\.late: layers: expected 0 to 1, got 2",
        ),
        (
            Arm("own", "zo", options={"parameters": "*.gone"}),
            {},
            r"arms\.own: .*'\*\.gone'",
        ),
        (
            "zo_robust",
            {"score": ScoreConfig(quantization="int4-g128", selected=1)},
            r"score\.quantization: group_size: expected a divisor of 32, .*, got 128",
        ),
        (
            "zo_robust",
            {"score": ScoreConfig(max_length=6, selected=1)},
            r"score: example 0: expected a prompt of 1 to 5 tokens",
        ),
        (
            "zo_robust",
            {"device": "cuda:99"},
            r"device: expected a GPU out of the \d+ that torch sees",
        ),
    ],
    ids=["selected", "layers", "parameters", "groups", "prompts", "device"],
)
def test_what_the_model_cannot_do_is_refused_before_anything(arm, changes, message, tmp_path):
    config = small_config(write_files(tmp_path), arm, **changes)
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
