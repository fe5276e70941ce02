"""The part of ZOSGD that writes replay logs and goes on with them."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from zo_kernels import noise
from zo_kernels.modes import Mode
from zo_kernels.optim.groups import Group
from zo_kernels.replay import (
    Header,
    LogWriter,
    Parameter,
    WarmStart,
    check_base,
    fingerprint,
    read_log,
    replay_,
)

NORM_PERIOD = 100  # steps between two measurements of ||theta||


class Logged:
    """Replay logs of an optimizer that has these attributes.

    Attributes:
        seed, queries, mode, steps, param_groups, state: as of ``ZOSGD``.
        log: the open log, or None.
    """

    seed: int
    queries: int
    mode: Mode
    steps: int
    log: LogWriter | None
    param_groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]
    #: What joins the update of the first step that is not skipped.
    _warm_start: WarmStart | None = None

    @abstractmethod
    def _groups(self) -> list[Group]:
        """The groups that have trainable parameters, as they are now."""

    @abstractmethod
    def _measure_norm(self, group: Group) -> None:
        """||theta|| of the group into its options, where it is due."""

    def start_log(self, path: str | os.PathLike[str], *, user: Any = None) -> None:
        """Log every further step to a new file, from which replay rebuilds the weights.

        Args:
            path: of the file; see ``zo_kernels.replay``.
            user: anything that JSON can hold, kept in the header.

        Raises:
            FileExistsError, OSError: the file exists, or cannot be made.
            ValueError: steps were taken already, or mode "mezo", which cannot be replayed.
        """
        if self.steps:
            raise ValueError(f"start_log: expected no step before it, got {self.steps}")
        groups = self._groups()
        slots = [slot for group in groups for slot in group.slots]
        base = fingerprint((slot.name, slot.tensor) for slot in slots)
        self.log = LogWriter(path, self._header(groups, base=base, user=user))

    def warm_start(self, directions: Sequence[int], scales: Mapping[str, Sequence[float]]) -> None:
        """Join an update that was measured elsewhere with that of the first step.

            theta_i <- round(theta_i + sum_k scales[i][k] z_k)

        after the update of the first step that is not skipped: gradient estimates along other
        directions, such as those that scored layers, as further queries of that step. Logs and
        replay have it too.

        Args:
            directions: of the z.
            scales: by parameter name, one per direction.

        Raises:
            ValueError: steps were taken already or a log was begun, a name that is none of the
                optimizer's, or scales that are not finite or not one per direction.
        """
        if self.steps or self.log is not None:
            raise ValueError("warm_start: expected it before the first step and before any log")
        warm = WarmStart(
            tuple(directions), {name: tuple(map(float, row)) for name, row in scales.items()}
        )
        known = {slot.name for group in self._groups() for slot in group.slots}
        unknown = sorted(warm.scales.keys() - known)
        if unknown:
            raise ValueError(
                f"warm_start: expected parameters of the optimizer, got '{unknown[0]}'"
            )
        self._warm_start = warm

    def end_log(self) -> None:
        """Write the weights' fingerprint behind the last step and close the log."""
        if self.log is None:
            raise ValueError("end_log: expected a log that was begun, got none")
        slots = [slot for group in self._groups() for slot in group.slots]
        self.log.write_mark(fingerprint((slot.name, slot.tensor) for slot in slots))
        self.log.close()
        self.log = None

    def resume_log(
        self,
        path: str | os.PathLike[str],
        *,
        progress: Callable[[str, float, float], None] | None = None,
    ) -> int:
        """Take the weights, which are those before the first step, to where a log ends, and go on.

        The next steps have the bits of a run that was never interrupted, if the closures and the
        learning rates are the same: take schedulers and data to ``steps`` too.

        Args:
            path: of a log that a run with the same parameters and options left.
            progress: called as progress(text, done, total).

        Returns:
            The number of steps in the log.

        Raises:
            ValueError: steps were taken already, or the log is damaged, of another run or of other
                weights; names what differs. The weights are as before then.
        """
        if self.steps:
            raise ValueError(f"resume_log: expected no step before it, got {self.steps}")
        log = read_log(path)
        groups = self._groups()
        slots = [slot for group in groups for slot in group.slots]
        tensors = {slot.name: slot.tensor for slot in slots}
        self._header(groups, measured=False).check_continues(log.header)
        check_base(tensors, log.header)
        for group, logged in zip(groups, log.header.groups, strict=True):
            if group.options["relative_eps"] and all(p.unit == 1.0 for p in logged):
                raise ValueError(f"relative_eps: expected False as in {path}, got True")
        for group, logged in zip(groups, log.header.groups, strict=True):
            if group.options["relative_eps"]:  # measured again they may differ, elsewhere
                for slot, parameter in zip(group.slots, logged, strict=True):
                    self.state[slot.tensor]["std"] = parameter.unit
        # ||theta|| decides about learning rates with update_norm: measure it where the run did.
        measured = len(log.steps) // NORM_PERIOD * NORM_PERIOD
        options = {"backend": self.mode.backend, "progress": progress}
        state = replay_(tensors, log, stop=measured, **options)
        self.steps = measured
        for group in groups:
            self._measure_norm(group)
        state = replay_(tensors, log, start=measured, state=state, **options)
        names = {noise.canonical_name(slot.name): slot.name for slot in slots}
        self.mode.load_state({names[n]: copy for n, copy in state.copies.items()}, slots)
        warm, self._warm_start = log.header.warm_start, None
        if warm is not None and log.skipped.all():  # with the names that this run has
            scales = {names[noise.canonical_name(n)]: row for n, row in warm.scales.items()}
            self._warm_start = WarmStart(warm.directions, scales)
        self.log = LogWriter.resume(path, log.header)
        self.steps = len(log.steps)
        return self.steps

    def _header(
        self,
        groups: Sequence[Group],
        *,
        base: str | None = None,
        user: Any = None,
        measured: bool = True,
    ) -> Header:
        return Header(
            seed=self.seed,
            queries=self.queries,
            mode=self.mode.name,
            distribution=self.mode.distribution,
            groups=tuple(
                tuple(
                    Parameter.of(
                        slot.name,
                        slot.tensor,
                        slot.stream,
                        None if group.options["relative_eps"] and not measured else unit,
                    )
                    for slot, unit in zip(group.slots, group.units, strict=True)
                )
                for group in groups
            ),
            base=base,
            user=user,
            warm_start=self._warm_start,
        )

    def _expect_logged(self, groups: Sequence[Group]) -> None:
        """ValueError unless the trainable parameters are those that the log began with."""
        logged = [
            [noise.canonical_name(parameter.name) for parameter in group]
            for group in self.log.header.groups
        ]
        found = [[noise.canonical_name(slot.name) for slot in group.slots] for group in groups]
        if found != logged:
            names = {name for group in found for name in group}
            others = sorted(names ^ {name for group in logged for name in group})
            if not others:
                raise ValueError(
                    "ZOSGD.step: expected the parameter groups with which the log began, got the "
                    "same parameters in others"
                )
            raise ValueError(
                "ZOSGD.step: expected those parameters to be trainable with which the log began, "
                f"got {len(others)} that changed, such as '{others[0]}'"
            )
