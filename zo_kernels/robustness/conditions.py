"""The conditions of an evaluation, their names, and the configuration that lists them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from zo_kernels.formats import FORMATS
from zo_kernels.robustness.refusals import REFUSAL_LISTS
from zo_kernels.views import NOISE_KINDS

CLEAN, WEIGHT_NOISE, QUANTIZED = "clean", "weight_noise", "quantized"
ACTIVATION_NOISE = "activation_noise"
NOISES = (WEIGHT_NOISE, ACTIVATION_NOISE)
"""The kinds that have draws."""
_SCHEME = re.compile(rf"({'|'.join(FORMATS)})(-asym|-double)?(?:-g([1-9]\d*))?(?:-a([2-8]))?")


@dataclass(frozen=True)
class Condition:
    """One state of a model: `kind` clean, weight_noise, activation_noise or quantized.

    `level` is 0 for clean, sigma or alpha for noise, bits for quantisation; `draw` is None except
    for noise; `block` is the number of the only decoder block that is changed, None for all.
    Names: "clean", "w0.05/0" (sigma/draw), "a0.05/0" (alpha/draw), "int4", "int4-asym-g128",
    "int4-a8"; "w0.05@7/0" and "int4@7" in block 7 alone.
    """

    name: str
    kind: str
    level: float
    draw: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown kind, or a draw where none belongs or none is given."""
        kinds = (CLEAN, *NOISES, QUANTIZED)
        if self.kind not in kinds:
            raise ValueError(f"expected a kind out of {kinds}, got {self.kind!r}")
        if (self.draw is not None) != (self.kind in NOISES):
            raise ValueError(f"expected a draw for noise only, got {self}")

    @property
    def family(self) -> str:
        """The name without the draw: "clean", "w0.05", "int4", "int4@7"."""
        return self.name.partition("/")[0]

    @property
    def state(self) -> str:
        """The name without draw and block: "clean", "w0.05", "int4"."""
        return self.family.partition("@")[0]

    @property
    def changes_activations(self) -> bool:
        """Whether more than weights is disturbed."""
        quantized = self.kind == QUANTIZED and parse_scheme(self.state)["activations"] is not None
        return self.kind == ACTIVATION_NOISE or quantized

    def within(self, block: int) -> Condition:
        """The same in one decoder block alone."""
        draw = "" if self.draw is None else f"/{self.draw}"
        return replace(self, name=f"{self.state}@{block}{draw}", block=block)

    @staticmethod
    def noise(level: float, draw: int) -> Condition:
        """Weight noise of scale `level`, draw number `draw`."""
        return Condition(f"w{level:g}/{draw}", WEIGHT_NOISE, float(level), draw)

    @staticmethod
    def activation_noise(level: float, draw: int) -> Condition:
        """Noise of scale `level` on the decoder blocks' outputs, draw number `draw`."""
        return Condition(f"a{level:g}/{draw}", ACTIVATION_NOISE, float(level), draw)

    @staticmethod
    def quantized(scheme: str) -> Condition:
        """Round to nearest, named as ``parse_scheme`` has it; ValueError otherwise."""
        return Condition(scheme, QUANTIZED, float(FORMATS[parse_scheme(scheme)["scheme"]].bits))


def parse_scheme(name: str) -> dict[str, Any]:
    """Turn a scheme's name into the arguments of ``zk.quantized``, and the activations' format.

    <format>[-asym | -double][-g<group size>][-a<bits>], with a format of ``zk.fake_quant``:
    "int4", "int4-asym-g128", "nf4-double", "mxfp4"; "int8-a8" is W8A8.

    Returns:
        scheme, symmetric, double_quant and group_size; activations: "int<bits>" or None.

    Raises:
        ValueError: another name, "-asym" of a format without zero points, or "-double" of another
            than nf4.
    """
    match = _SCHEME.fullmatch(name)
    if match is None:
        raise ValueError(
            "expected a scheme <format>[-asym|-double][-g<group size>][-a<bits>] with a format "
            f"out of {tuple(FORMATS)}, got {name!r}"
        )
    scheme, variant, group, bits = match.groups()
    if (variant == "-asym" and FORMATS[scheme].kind != "int") or (
        variant == "-double" and scheme != "nf4"
    ):
        raise ValueError(f"{name!r}: expected -asym of an integer format or -double of nf4")
    return {
        "scheme": scheme,
        "symmetric": variant != "-asym",
        "double_quant": variant == "-double",
        "group_size": int(group) if group else None,
        "activations": f"int{bits}" if bits else None,
    }


def check_weight_scheme(option: str, name: str) -> None:
    """Raise ValueError, which names the option, for another name than a scheme of weights alone."""
    try:
        activations = parse_scheme(name)["activations"]
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    if activations:
        raise ValueError(f"{option}: expected one of weights alone, got {name!r}")


def default_conditions(
    noise: Sequence[float] = (0.05, 0.1),
    draws: int = 3,
    quantization: Sequence[str] = ("int8", "int4"),
    activation_noise: Sequence[float] = (),
) -> list[Condition]:
    """List clean, each noise at each level times `draws` draws, and each quantisation scheme."""
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    for name, levels in (("noise", noise), ("activation_noise", activation_noise)):
        if any(not (math.isfinite(level) and level > 0) for level in levels):
            raise ValueError(f"{name}: expected finite levels above 0, got {list(levels)}")
    conditions = [
        Condition("clean", CLEAN, 0.0),
        *(Condition.noise(level, draw) for level in noise for draw in range(draws)),
        *(
            Condition.activation_noise(level, draw)
            for level in activation_noise
            for draw in range(draws)
        ),
        *(Condition.quantized(scheme) for scheme in quantization),
    ]
    names = [condition.name for condition in conditions]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"expected each condition once, got {twice} more often")
    return conditions


@dataclass
class EvaluationConfig:
    """What `evaluate` measures, and how.

    Attributes:
        noise: noise scales, in the unit of `noise_kind`.
        draws: noise draws a level. Intervals and tests count draws as a sample: with 3 they are
            wide, 5 or more pay.
        noise_seed: the noise's seed, the same for all checkpoints that are to be compared.
        noise_kind: "abs", "rel_std" or "rel_norm", see `views.noise_std`.
        noise_on: "linear" (weights of the decoder blocks' linears) or "all" parameters.
        activation_noise: scales of noise on the decoder blocks' outputs, in units of each token's
            standard deviation.
        quantization: scheme names, see `parse_scheme`; always on the decoder blocks' linears.
        max_new_tokens: answer length limit in tokens.
        batch_size: examples a forward.
        max_length: token limit of prompt plus completion for the losses.
        refusal_list: a key of `refusals.REFUSAL_LISTS`.
        refusal: the completion whose loss is taken for harmful prompts that have none of their own.
        generate_under: families ("clean", "w0.05", "int4") in which text is generated; None: all.
        max_prompts: the first so many examples of each kind; None: all.
        copy_weights: keep a copy of the weights that are quantised while they are: answers come
            two to three times faster, for the memory of that copy.
        layers: families whose refusal loss is taken with one decoder block at a time changed: its
            linears, or with `noise_on` "all" everything in it.
        layer_prompts: harmful examples that these losses are over, the first so many.
        perplexity_tokens: the first so many tokens of the utility text; None: all.
        perplexity_window: window in tokens.
    """

    noise: tuple[float, ...] = (0.05, 0.1)
    draws: int = 3
    noise_seed: int = 0
    noise_kind: str = "rel_std"
    noise_on: str = "linear"
    activation_noise: tuple[float, ...] = ()
    quantization: tuple[str, ...] = ("int8", "int4")
    max_new_tokens: int = 48
    batch_size: int = 8
    max_length: int = 512
    refusal_list: str = "prefix-1"
    refusal: str = "I'm sorry, but I can't help with that."
    generate_under: tuple[str, ...] | None = None
    max_prompts: int | None = None
    copy_weights: bool = False
    layers: tuple[str, ...] = ()
    layer_prompts: int = 16
    perplexity_tokens: int | None = 4096
    perplexity_window: int = 256

    def conditions(self) -> list[Condition]:
        """The conditions, in the order they are run.

        Raises ValueError for a field out of its range.
        """
        conditions = default_conditions(
            self.noise, self.draws, self.quantization, self.activation_noise
        )
        families = {condition.family for condition in conditions}
        activations = {c.family for c in conditions if c.changes_activations}
        for field, value, allowed in (
            ("noise_kind", (self.noise_kind,), NOISE_KINDS),
            ("noise_on", (self.noise_on,), ("linear", "all")),
            ("refusal_list", (self.refusal_list,), tuple(REFUSAL_LISTS)),
            ("generate_under", self.generate_under or (), tuple(sorted(families))),
            ("layers", self.layers, tuple(sorted(families - {"clean"} - activations))),
        ):
            wrong = [item for item in value if item not in allowed]
            if wrong:
                raise ValueError(f"{field}: expected out of {allowed}, got {wrong}")
        for field in ("batch_size", "max_new_tokens", "layer_prompts"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected >= 1, got {getattr(self, field)}")
        if not self.refusal.strip():
            raise ValueError("refusal: expected a text, got none")
        if not 0 <= self.noise_seed < 1 << 64:
            raise ValueError(f"noise_seed: expected 0 <= seed < 2**64, got {self.noise_seed}")
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"max_prompts: expected >= 1 or None, got {self.max_prompts}")
        return conditions

    def layer_conditions(self, blocks: int) -> list[Condition]:
        """The conditions of `layers`, in each of so many decoder blocks alone."""
        chosen = [c for c in self.conditions() if c.family in self.layers]
        return [condition.within(block) for condition in chosen for block in range(blocks)]
