"""llama.cpp's own benchmark as the peer: run once between two of ours, its JSON read."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from flashmoe.errors import ConfigError


@dataclass(frozen=True)
class Peer:
    """llama-bench and the model that it runs."""

    program: Path
    model: Path

    def check(self) -> None:
        """Raises ConfigError when a file is missing."""
        if not self.program.is_file():
            raise ConfigError(
                f"{self.program}: no such program: build llama-bench as docs/benchmarks.md says"
            )
        if not self.model.is_file():
            raise ConfigError(f"{self.model}: no such file: give --peer-model a GGUF of the same shape")

    def run(self, prompts: list[int], tokens: int, contexts: list[int], threads: int) -> dict[str, float]:
        """Tokens per second, "prefill N" and "decode at N", of one repetition.  Raises ConfigError."""
        speeds: dict[str, float] = {}
        for depth in contexts:
            arguments = ["-p", "0", "-n", str(tokens), "-d", str(depth)]
            for entry in self._bench(arguments, threads):
                speeds[f"decode at {depth}"] = entry["avg_ts"]
        if prompts:
            for entry in self._bench(["-p", ",".join(map(str, prompts)), "-n", "0"], threads):
                speeds[f"prefill {entry['n_prompt']:.0f}"] = entry["avg_ts"]
        return speeds

    def _bench(self, arguments: list[str], threads: int) -> list[dict[str, float]]:
        command = [
            str(self.program),
            "-m",
            str(self.model),
            "-t",
            str(threads),
            "-r",
            "1",
            "-o",
            "json",
            *arguments,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            entries = json.loads(done.stdout)
            return [{key: float(entry[key]) for key in ("avg_ts", "n_prompt")} for entry in entries]
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or "").strip().splitlines()[-1:] or ["no message"]
            raise ConfigError(f"{self.program} failed ({reason[0]}): try it by hand") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.program}: cannot read its results ({error}): is it llama-bench?"
            ) from None
