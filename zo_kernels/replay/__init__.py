"""Replay logs: a run rebuilt bit for bit from the base weights and under 100 bytes per step."""

from zo_kernels.replay.apply import ReplayState, check_base, logged_tensors, replay_
from zo_kernels.replay.compare import Difference, diff
from zo_kernels.replay.directory import Replayed, replay_directory
from zo_kernels.replay.fingerprint import fingerprint
from zo_kernels.replay.header import ARITHMETICS, Header, Parameter, WarmStart, arithmetic_of
from zo_kernels.replay.log import Log, Mark, read_log
from zo_kernels.replay.updates import group_update, warm_start_update
from zo_kernels.replay.walk import Check, verify
from zo_kernels.replay.writer import GroupStep, LogWriter, Step

__all__ = [
    "ARITHMETICS",
    "Check",
    "Difference",
    "GroupStep",
    "Header",
    "Log",
    "LogWriter",
    "Mark",
    "Parameter",
    "ReplayState",
    "Replayed",
    "Step",
    "WarmStart",
    "arithmetic_of",
    "check_base",
    "diff",
    "fingerprint",
    "group_update",
    "logged_tensors",
    "read_log",
    "replay_",
    "replay_directory",
    "verify",
    "warm_start_update",
]
