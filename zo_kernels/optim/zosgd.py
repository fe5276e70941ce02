"""ZOSGD: two-point zeroth-order SGD as a torch optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from zo_kernels import noise, ops
from zo_kernels.modes import MODES, Closure, GroupUpdate, Slot, uninterrupted
from zo_kernels.moments import standard_deviation
from zo_kernels.optim.groups import Group, check_group, check_storage
from zo_kernels.optim.logged import NORM_PERIOD, Logged
from zo_kernels.optim.record import Running, StepRecord
from zo_kernels.replay import (
    GroupStep,
    LogWriter,
    Step,
    WarmStart,
    group_update,
    warm_start_update,
)

_SAMPLE = 4096  # elements of each tensor over which a mode's restore error is measured


class ZOSGD(Logged, torch.optim.Optimizer):
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
            kept in the state; a constant tensor is not perturbed, and its update is weight decay
            alone.
        queries: directions per step, at least 1.
        weight_decay: decoupled, multiplied by lr.
        clip_projected_gradient: bound on \|g_q\|, or None.
        update_norm: if given, the learning rate of each step is calibrated so that
            ``||dtheta|| / ||theta|| = update_norm * lr / lr0`` in the group, with lr0 the lr it was
            added with: lr only shapes the schedule then.
        mode: who owns the weights during an evaluation: "streamed" (default), "dual", "inplace",
            "snapshot", "master", "master8", or "mezo" (drifts; for comparison); see
            ``zo_kernels.modes``.
        seed: key of all noise, in [0, 2^64).
        distribution: of z, "normal" or "rademacher" (+1 or -1, with which the passes over the
            weights run at the speed of memory on every GPU).
        backend: None (by device), "reference", "native" or "triton".
        diagnostics: measure in each update what it did to the weights (``StepRecord``).

    The closure may return any number; it runs without gradients. It must be a pure function of
    the weights: evaluation mode, the same batch in all calls of one step. Gradient accumulation is
    a closure that returns the mean loss over micro-batches.

    Attributes:
        last_step: ``StepRecord`` of the latest step, None before the first.
        steps: number of steps taken, skipped ones included.
        log: the ``LogWriter`` of ``start_log`` or ``resume_log``, or None.
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
        diagnostics: bool = True,
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
        self.queries, self.seed, self.diagnostics = queries, seed, diagnostics
        self.mode = MODES[mode](seed=seed, backend=backend, distribution=distribution)
        self.steps = 0
        self.last_step: StepRecord | None = None
        self.log: LogWriter | None = None
        self._gradients = Running()
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
        if getattr(self, "log", None) is not None:
            raise RuntimeError(
                "add_param_group: expected it before the log was begun, got it after"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            check_storage(self.param_groups)
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
        counted, and ``last_step.skipped`` names the exception. The same holds if the step cannot be
        logged: it is on the disk before the weights change. Ctrl-C during the update waits until it
        is made: that step counts, and is not skipped.
        """
        if closure is None:
            raise TypeError("ZOSGD.step: expected a closure that evaluates the loss, got None")
        groups = self._groups()
        self.mode.settle()
        for group in groups:
            self._measure_norm(group)
        record = StepRecord(self.steps, lr=[float(group.options["lr"]) for group in groups])
        self.last_step = record
        try:
            self._evaluate(groups, closure, record)
            with uninterrupted():
                self._finish(groups, record)
        except BaseException as error:
            if self.steps == record.step:  # else the step is taken, and Ctrl-C came after it
                record.skipped = f"{type(error).__name__}: {error}"
            self.mode.settle()
            raise
        if record.skipped and not self._warned:
            self._warned = True
            warnings.warn(f"ZOSGD: step {record.step} skipped: {record.skipped}", stacklevel=2)
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
            "held": self.mode.state(),
            "warm_start": self._warm_start and asdict(self._warm_start),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue another optimizer's run: its seed, step count, groups and measured scales.

        Load the model's weights first: masters and residuals belong to them.

        Raises:
            ValueError: if the state is not ZOSGD's, needs another NOISE_SPEC, mode or
                distribution, or is of other parameters; the optimizer is as before then.
            RuntimeError: if a log was begun, which such a run does not continue.
        """
        if self.log is not None:
            raise RuntimeError("load_state_dict: expected no log, got one that was begun")
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
        slots = [
            Slot(name, tensor, self._streams[name])
            for group in self.param_groups
            for name, tensor in zip(group["param_names"], group["params"], strict=True)
        ]
        before = self.mode.state()
        self.mode.load_state(zo.get("held", {}), slots)
        try:
            super().load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        except BaseException:
            self.mode.load_state(before, slots)
            raise
        self.seed = self.mode.seed = zo["seed"]
        self.queries, self.steps = zo["queries"], zo["steps"]
        warm = zo.get("warm_start")
        self._warm_start = None if warm is None else WarmStart(**warm)

    def _groups(self) -> list[Group]:
        """The groups that have trainable parameters, as they are now."""
        groups = []
        for options in self.param_groups:
            slots = [
                Slot(name, tensor, self._streams[name])
                for name, tensor in zip(options["param_names"], options["params"], strict=True)
                if tensor.requires_grad
            ]
            if slots:
                groups.append(Group(options, slots, self._units(options, slots)))
        if not groups:
            raise ValueError("ZOSGD: expected a parameter with requires_grad=True, got none")
        return groups

    def _units(self, options: dict[str, Any], slots: Sequence[Slot]) -> list[float]:
        """The coordinate scale of each slot: 1, or its standard deviation at the first step."""
        if not options["relative_eps"]:
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

    def _evaluate(self, groups: Sequence[Group], closure: Closure, record: StepRecord) -> None:
        """All evaluations of a step, into the record."""
        slots = [slot for group in groups for slot in group.slots]
        scales = [float(group.options["eps"]) * unit for group in groups for unit in group.units]
        sample = [] if self.mode.exact else _sample(slots)
        for query in range(self.queries):
            direction = noise.training_direction(self.steps, self.queries, query)
            plus, minus = self.mode.evaluate_pair(slots, scales, direction, closure)
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

    def _finish(self, groups: Sequence[Group], record: StepRecord) -> None:
        """Log the step and apply its update."""
        steps = [self._group_step(number, group, record) for number, group in enumerate(groups)]
        if self.log is not None:
            self._expect_logged(groups)
            losses = record.losses_plus, record.losses_minus
            self.log.write_step(Step(record.step, *losses, steps, record.skipped is not None))
        if record.skipped:
            self.mode.settle()
        else:
            self._update(groups, steps, record)
            self._update_warm(groups)
        self.steps += 1

    def _group_step(self, number: int, group: Group, record: StepRecord) -> GroupStep:
        """The learning rate and the coefficients of one group's update."""
        options, lr = group.options, float(group.options["lr"])
        eps, clip = float(options["eps"]), options["clip_projected_gradient"]
        if record.skipped:
            return GroupStep(lr, eps, 1.0, [0.0] * self.queries)
        gradients = [
            (plus - minus) / (2 * eps) if eps else 0.0
            for plus, minus in zip(record.losses_plus, record.losses_minus, strict=True)
        ]
        if clip is not None:
            gradients = [max(-clip, min(clip, g)) for g in gradients]
        if number == 0:
            record.projected_gradients = gradients
        if options["update_norm"] is not None:
            # ||dtheta|| per unit of lr, from E z^2 = 1.
            size = sum(
                unit * unit * slot.tensor.numel()
                for unit, slot in zip(group.units, group.slots, strict=True)
            )
            length = math.sqrt(size * sum(g * g for g in gradients)) / self.queries
            schedule = lr / options["base_lr"] if options["base_lr"] else float(lr > 0)
            target = float(options["update_norm"]) * schedule * options["norm"]
            lr = target / length if length else 0.0
        record.lr[number] = lr
        decay = 1.0 - lr * float(options["weight_decay"])
        return GroupStep(lr, eps, decay, [-lr * g / self.queries for g in gradients])

    def _update(
        self, groups: Sequence[Group], steps: Sequence[GroupStep], record: StepRecord
    ) -> None:
        updates = []
        for group, step in zip(groups, steps, strict=True):
            update = group_update(group.units, step.coefficients, step.decay, record.directions)
            if update is not None:
                updates.append(GroupUpdate(group.slots, update.scales, update.src_scale))
        rows = sum(len(update.slots) for update in updates)
        changes = None
        if self.diagnostics:  # on the CPU, whatever the caller's default device
            changes = torch.full((rows, 3), math.nan, dtype=torch.float64, device="cpu")
        if updates:
            self.mode.update(updates, record.directions, changes)
        else:
            self.mode.settle()
        if not self.diagnostics:
            return
        moved, intended, lost = changes.sum(0).tolist()
        total = sum(slot.tensor.numel() for group in groups for slot in group.slots)
        if math.isfinite(moved):
            record.update_norm, record.intended_norm = math.sqrt(moved), math.sqrt(intended)
            record.lost = lost / total if total else 0.0
            norm = math.sqrt(sum(group.options["norm"] ** 2 for group in groups))
            record.update_ratio = record.update_norm / norm if norm else None
        for gradient in record.projected_gradients:
            self._gradients.add(gradient)
        record.gradient_mean, record.gradient_std = self._gradients.mean, self._gradients.std

    def _update_warm(self, groups: Sequence[Group]) -> None:
        """The warm start, once."""
        warm, self._warm_start = self._warm_start, None
        if warm is None:
            return
        updates = []
        for group in groups:
            update = warm_start_update(warm, group.slots)
            if update is not None:
                updates.append(GroupUpdate(group.slots, update.scales, update.src_scale))
        if updates:
            self.mode.update(updates, warm.directions, None)

    def _measure_norm(self, group: Group) -> None:
        """||theta|| of the group into its options, every so many steps, where it is asked for."""
        options, period = group.options, self.steps // NORM_PERIOD
        wanted = self.diagnostics or options["update_norm"] is not None
        if wanted and options.get("norm_period") != period:
            options["norm_period"] = period
            options["norm"] = math.sqrt(
                sum(
                    standard_deviation(slot.tensor, centred=False) ** 2 * slot.tensor.numel()
                    for slot in group.slots
                )
            )


def _sample(slots: Sequence[Slot]) -> list[Tensor]:
    return [slot.tensor.detach().view(-1)[:_SAMPLE].clone() for slot in slots]
