"""The bus: typed messages out of a training run, and commands back into it."""

from esper.oona.codec import decode, encode
from esper.oona.collector import Collector
from esper.oona.commands import CommandInbox, send_command
from esper.oona.config import BusConfig
from esper.oona.publisher import Publisher
from esper.oona.runs import RunInfo, find_runs
from esper.oona.subscriber import Subscriber

__all__ = [
    "BusConfig",
    "Collector",
    "CommandInbox",
    "Publisher",
    "RunInfo",
    "Subscriber",
    "decode",
    "encode",
    "find_runs",
    "send_command",
]
