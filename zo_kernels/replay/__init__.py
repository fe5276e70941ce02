"""Replay logs: a run rebuilt bit for bit from the base weights and under 100 bytes per step."""

from zo_kernels.replay.apply import ReplayState, check_base, logged_tensors, replay_
from zo_kernels.replay.fingerprint import fingerprint
from zo_kernels.replay.header import ARITHMETICS, Header, Parameter, arithmetic_of
from zo_kernels.replay.log import Log, Mark, read_log
from zo_kernels.replay.updates import group_update
from zo_kernels.replay.writer import GroupStep, LogWriter, Step

__all__ = [
    "ARITHMETICS",
    "GroupStep",
    "Header",
    "Log",
    "LogWriter",
    "Mark",
    "Parameter",
    "ReplayState",
    "Step",
    "arithmetic_of",
    "check_base",
    "fingerprint",
    "group_update",
    "logged_tensors",
    "read_log",
    "replay_",
]
