"""ZOSGD: two-point zeroth-order SGD as a torch optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import noise, ops
from zo_kernels.checks import check_tensor
from zo_kernels.modes import MODES, Closure, Slot
from zo_kernels.moments import standard_deviation

_SAMPLE = 4096  # elements of each tensor over which a mode's restore error is measured
_NORM_REFRESH = 100  # steps between two measurements of ||theta|| for update_norm
_GROUP_CHECKS = {
    "lr": (0.0, False),
    "eps": (0.0, False),
    "weight_decay": (0.0, False),
    "clip_projected_gradient": (0.0, True),
    "update_norm": (0.0, True),
}


@dataclass(slots=True)
class StepRecord:
    """What one step did. Lists have one entry per query.

    ``projected_gradients`` are (l+ - l-) / (2 eps) of the first parameter group, after clipping;
    ``update_ratio`` is ||dtheta|| / ||theta|| over all groups (expected, from the known variance
    of z) where the run measures ||theta|| (``update_norm``), else None. ``restore_error`` is the
    root mean square change that the evaluations left in the weights before the update: 0 by
    construction in the exact modes, measured on the first 4096 elements of each tensor in others.
    """

    step: int
    directions: list[int] = field(default_factory=list)
    losses_plus: list[float] = field(default_factory=list)
    losses_minus: list[float] = field(default_factory=list)
    projected_gradients: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    update_ratio: float | None = None
    restore_error: float = 0.0
    skipped: str | None = None

    @property
    def loss(self) -> float:
        """Mean of all losses evaluated in the step; NaN if there was none."""
        losses = self.losses_plus + self.losses_minus
        return sum(losses) / len(losses) if losses else math.nan


class ZOSGD(torch.optim.Optimizer):
    r"""SGD along gradients estimated from losses at theta + eps z and theta - eps z.

    Per query, with z ~ N(0, I) or Rademacher, addressed by (seed, direction, parameter, element):

        g = (l(theta + eps z) - l(theta - eps z)) / (2 eps)
        theta <- (1 - lr * weight_decay) theta - lr * mean_q(g_q z_q)

    which is SPSA as in MeZO (https://arxiv.org/abs/2305.17333) and Definition 3.1 of
    https://arxiv.org/abs/2605.29396. z is never stored, the update is one pass over the weights
    for all queries, and 16-bit weights are rounded stochastically so that small updates arrive.

    With ``relative_eps`` the step is taken in coordinates scaled by each tensor's standard
    deviation s: the perturbation is eps * s * z and the update lr * s * g * z.

    Args:
        params: ``model.named_parameters()``, or parameter groups whose "params" are (name, tensor)
            pairs. Names are needed: they are the addresses of the noise. Parameters with
            ``requires_grad=False`` at the time of a step are left alone.
        lr: learning rate, at least 0; torch LR schedulers work.
        eps: perturbation scale, at least 0; absolute, or a multiple of each tensor's standard
            deviation with ``relative_eps``.
        relative_eps: see above. The standard deviations are measured once, at the first step, and
            kept in the state; a constant tensor is neither perturbed nor updated.
        queries: directions per step, at least 1.
        weight_decay: decoupled, multiplied by lr.
        clip_projected_gradient: bound on \|g_q\|, or None.
        update_norm: if given, the learning rate of each step is calibrated so that
            ``||dtheta|| / ||theta|| = update_norm * lr / lr0`` in the group, with lr0 the lr it was
            added with: lr only shapes the schedule then.
        mode: who owns the weights during an evaluation: "streamed" (default, exact) or "mezo"
            (in place, drifts; for comparison).
        seed: key of all noise, in [0, 2^64).
        distribution: of z, "normal" or "rademacher" (+1 or -1, with which the passes over the
            weights run at the speed of memory on every GPU).
        backend: None (by device), "reference", "native" or "triton".

    The closure may return any number; it runs without gradients. It must be a pure function of
    the weights: evaluation mode, the same batch in all calls of one step. Gradient accumulation is
    a closure that returns the mean loss over micro-batches.

    Attributes:
        last_step: ``StepRecord`` of the latest step, None before the first.
        steps: number of steps taken, skipped ones included.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        relative_eps: bool = False,
        queries: int = 1,
        weight_decay: float = 0.0,
        clip_projected_gradient: float | None = None,
        update_norm: float | None = None,
        mode: str = "streamed",
        seed: int = 0,
        distribution: str = "normal",
        backend: str | None = None,
    ) -> None:
        if isinstance(queries, bool) or not isinstance(queries, int) or queries < 1:
            raise ValueError(f"queries: expected an int of at least 1, got {queries!r}")
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {sorted(MODES)}, got {mode!r}")
        if backend is not None and backend not in ops.BACKENDS:
            raise ValueError(f"backend: expected None or one of {ops.BACKENDS}, got {backend!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise ValueError(f"seed: expected an int with 0 <= seed < 2^64, got {seed!r}")
        if distribution not in noise.DISTRIBUTIONS:
            raise ValueError(
                f"distribution: expected one of {noise.DISTRIBUTIONS}, got {distribution!r}"
            )
        self.queries, self.seed = queries, seed
        self.mode = MODES[mode](seed=seed, backend=backend, distribution=distribution)
        self.steps = 0
        self.last_step: StepRecord | None = None
        self._streams: dict[str, int] = {}
        self._warned = False
        defaults = {
            "lr": lr,
            "eps": eps,
            "relative_eps": relative_eps,
            "weight_decay": weight_decay,
            "clip_projected_gradient": clip_projected_gradient,
            "update_norm": update_norm,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            TypeError, ValueError: naming the parameter or option, what was expected, what came.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            names = [name for g in self.param_groups for name in g["param_names"]]
            self._streams = noise.assign_streams(names)
        except Exception:
            self.param_groups.pop()
            raise
        group["base_lr"] = float(group["lr"])

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """One step of ``queries`` two-point evaluations and one update.

        Args:
            closure: evaluates the loss, without arguments; called 2 * queries times.

        Returns:
            The mean of the losses evaluated (at perturbed weights). NaN or infinite if one was;
            then no update is made, the weights are as before, and ``last_step.skipped`` says why.

        An exception in the closure passes through; the weights are as before, the step is not
        counted, and ``last_step.skipped`` names the exception.
        """
        if closure is None:
            raise TypeError("ZOSGD.step: expected a closure that evaluates the loss, got None")
        groups = [(group, self._slots(group)) for group in self.param_groups]
        groups = [(group, slots) for group, slots in groups if slots]
        if not groups:
            raise ValueError("ZOSGD.step: expected a parameter with requires_grad=True, got none")
        units = [self._units(group, slots) for group, slots in groups]
        slots = [slot for _, members in groups for slot in members]
        scales = [
            float(group["eps"]) * unit
            for (group, _), members in zip(groups, units, strict=True)
            for unit in members
        ]
        record = StepRecord(self.steps, lr=[float(group["lr"]) for group, _ in groups])
        self.last_step = record
        sample = [] if self.mode.exact else _sample(slots)
        for query in range(self.queries):
            direction = noise.training_direction(self.steps, self.queries, query)
            try:
                plus, minus = self.mode.evaluate_pair(slots, scales, direction, closure)
            except BaseException as error:
                record.skipped = f"{type(error).__name__}: {error}"
                raise
            record.directions.append(direction)
            record.losses_plus.append(plus)
            record.losses_minus.append(minus)
            if not (math.isfinite(plus) and math.isfinite(minus)):
                record.skipped = f"non-finite loss in query {query}: l+ = {plus}, l- = {minus}"
                break
        if sample:
            differences = zip(_sample(slots), sample, strict=True)
            record.restore_error = standard_deviation(
                torch.cat([after.float() - before.float() for after, before in differences]),
                centred=False,
            )
        if record.skipped:
            if not self._warned:
                self._warned = True
                warnings.warn(f"ZOSGD: step {self.steps} skipped: {record.skipped}", stacklevel=2)
        else:
            self._update(groups, units, record)
        self.steps += 1
        return record.loss

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict plus "zo": what the noise of the run depends on."""
        state = super().state_dict()
        state["zo"] = {
            "noise_spec": noise.NOISE_SPEC,
            "seed": self.seed,
            "queries": self.queries,
            "steps": self.steps,
            "mode": self.mode.name,
            "distribution": self.mode.distribution,
            "streams": dict(self._streams),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue another optimizer's run: its seed, step count, groups and measured scales.

        Raises:
            ValueError: if the state is not ZOSGD's, needs another NOISE_SPEC, mode or
                distribution, or is of parameters with other names.
        """
        zo = state_dict.get("zo")
        if zo is None:
            raise ValueError("load_state_dict: expected a ZOSGD state with key 'zo', got none")
        for key, expected in (
            ("noise_spec", noise.NOISE_SPEC),
            ("mode", self.mode.name),
            ("distribution", self.mode.distribution),
            ("streams", self._streams),
        ):
            if zo.get(key) != expected:
                raise ValueError(f"load_state_dict: expected {key} {expected}, got {zo.get(key)}")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        self.seed = self.mode.seed = zo["seed"]
        self.queries, self.steps = zo["queries"], zo["steps"]

    def _slots(self, group: dict[str, Any]) -> list[Slot]:
        return [
            Slot(name, tensor, self._streams[name])
            for name, tensor in zip(group["param_names"], group["params"], strict=True)
            if tensor.requires_grad
        ]

    def _units(self, group: dict[str, Any], slots: Sequence[Slot]) -> list[float]:
        """The coordinate scale of each slot: 1, or its standard deviation at the first step."""
        if not group["relative_eps"]:
            return [1.0] * len(slots)
        units = []
        for slot in slots:
            state = self.state[slot.tensor]
            if "std" not in state:
                state["std"] = standard_deviation(slot.tensor)
                if not math.isfinite(state["std"]):
                    raise ValueError(f"'{slot.name}': expected finite weights, got NaN or infinity")
            units.append(state["std"])
        return units

    def _update(
        self,
        groups: Sequence[tuple[dict[str, Any], list[Slot]]],
        units: Sequence[list[float]],
        record: StepRecord,
    ) -> None:
        moved = norm = 0.0
        measured = True
        for number, ((group, slots), members) in enumerate(zip(groups, units, strict=True)):
            eps, clip = float(group["eps"]), group["clip_projected_gradient"]
            gradients = [
                (plus - minus) / (2 * eps) if eps else 0.0
                for plus, minus in zip(record.losses_plus, record.losses_minus, strict=True)
            ]
            if clip is not None:
                gradients = [max(-clip, min(clip, g)) for g in gradients]
            if number == 0:
                record.projected_gradients = gradients
            # ||dtheta|| per unit of lr, from E z^2 = 1.
            size = sum(
                unit * unit * slot.tensor.numel() for unit, slot in zip(members, slots, strict=True)
            )
            length = math.sqrt(size * sum(g * g for g in gradients)) / self.queries
            lr = float(group["lr"])
            if group["update_norm"] is not None:
                group_norm = self._norm(group, slots)
                schedule = lr / group["base_lr"] if group["base_lr"] else 1.0
                target = float(group["update_norm"]) * schedule * group_norm
                lr = target / length if length else 0.0
                moved, norm = moved + (lr * length) ** 2, norm + group_norm**2
            else:
                measured = False
            record.lr[number] = lr
            decay = 1.0 - lr * float(group["weight_decay"])
            scales = [[-lr * unit * g / self.queries for g in gradients] for unit in members]
            if decay != 1.0 or any(c for row in scales for c in row):
                self.mode.update(slots, scales, record.directions, decay)
        if measured and norm:
            record.update_ratio = math.sqrt(moved / norm)

    def _norm(self, group: dict[str, Any], slots: Sequence[Slot]) -> float:
        if "norm" not in group or self.steps % _NORM_REFRESH == 0:
            group["norm"] = math.sqrt(
                sum(
                    standard_deviation(slot.tensor, centred=False) ** 2 * slot.tensor.numel()
                    for slot in slots
                )
            )
        return group["norm"]

    def _check_group(self, group: dict[str, Any]) -> None:
        if "param_names" not in group:
            raise TypeError(
                "ZOSGD: expected named parameters (model.named_parameters()), got tensors without "
                "names: the name is the address of a parameter's noise"
            )
        for option, (low, optional) in _GROUP_CHECKS.items():
            value = group[option]
            if value is None and optional:
                continue
            if isinstance(value, Tensor):
                value = float(value)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{option}: expected a number, got {type(value).__name__}")
            if not (math.isfinite(value) and value >= low):
                raise ValueError(
                    f"{option}: expected a finite value of at least {low}, got {value}"
                )
        for name, tensor in zip(group["param_names"], group["params"], strict=True):
            check_tensor(f"'{name}'", tensor)
        self._check_storage()

    def _check_storage(self) -> None:
        """Two parameters over the same memory would be perturbed twice."""
        spans = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), name)
            for group in self.param_groups
            for name, tensor in zip(group["param_names"], group["params"], strict=True)
            if tensor.numel()
        )
        for (_, end, name), (start, _, other) in pairwise(spans):
            if start < end:
                raise ValueError(
                    f"'{other}' and '{name}': expected parameters with memory of their own, got "
                    "overlapping ones; tie them as one Parameter, or pass one of the two"
                )


def _sample(slots: Sequence[Slot]) -> list[Tensor]:
    return [slot.tensor.detach().view(-1)[:_SAMPLE].clone() for slot in slots]


def named_parameters(
    model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[tuple[str, nn.Parameter]]:
    """A model's parameters whose names match, by shell patterns (``*.mlp.*``), tied ones once.

    Args:
        include: patterns of which one must match; empty means all.
        exclude: patterns of which none may match.

    Raises:
        ValueError: if nothing is left, or a pattern matches nothing.
    """
    everything = list(model.named_parameters())
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name, _ in everything):
            raise ValueError(f"named_parameters: pattern {pattern!r} matches no parameter")
    chosen = [
        (name, parameter)
        for name, parameter in everything
        if (not include or any(fnmatchcase(name, p) for p in include))
        and not any(fnmatchcase(name, p) for p in exclude)
    ]
    if not chosen:
        raise ValueError("named_parameters: no parameter is left after include and exclude")
    return chosen
