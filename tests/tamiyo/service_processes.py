"""``esper serve`` in a process of its own, to be killed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from service_threads import QUICK


class Served:
    """Serves from construction on; ``port`` is where."""

    def __init__(self, folder: Path, port: str = "*", **settings: object) -> None:
        given = {**QUICK, "address": f"tcp://127.0.0.1:{port}", "store": str(folder / "x.db"), **settings}
        command = [sys.executable, "-m", "esper.cli", "serve"]
        for key, value in given.items():
            command += ["--set", f"{key}={value}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"tcp://127\.0\.0\.1:(\d+)", line)
        assert found, line + "".join(map(str, self.end(signal.SIGKILL)))
        self.port = found[1]

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal; returns the exit status and what was printed."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out + err

    def kill(self) -> None:
        """Whatever happens, nothing is left behind."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.communicate()
