"""The command ``flashmoe``: one sub-command per file, imported only when it is the one asked for.

argparse, because it starts in 30 ms where click takes 65 and typer 210 (Python 3.11, two slow cores), and
even that only once a command is known.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from flashmoe import env
from flashmoe.errors import FlashmoeError

# name -> what `flashmoe --help` says about it; the module of the same name has configure() and execute()
COMMANDS = {
    "run": "generate text with a model, its experts streamed from the drive",
    "chat": "talk to a model in the terminal, with tools if you like",
    "serve": "answer over HTTP: OpenAI's and Anthropic's APIs",
    "convert": "make a bundle from a Hugging Face or MLX checkpoint",
    "inspect": "show what a bundle or a checkpoint contains and what memory it needs",
    "plan": "foretell speed and memory of a model on this machine, before it is downloaded",
    "verify": "check every byte of a bundle against its checksums",
    "stripe": "spread a bundle's experts over several drives",
    "export": "write a bundle's weights as a Hugging Face checkpoint",
    "synth": "make a bundle of a real model's exact shape with random weights",
    "eval": "measure how good a bundle is: perplexity, divergence, questions, tool calls",
    "simulate": "replay recorded routing through cache policies, beside the bound",
    "cache": "train a cache policy on recorded routing",
    "bench": "measure speed beside what memory and processor allow, and beside llama.cpp",
    "doctor": "show what this machine offers: instruction set, memory, drives",
}

# `flashmoe bench WORD` measures something of its own: the word -> its module; a bundle of that name is ./WORD
BENCHES = {
    "stream": "bench_stream",
    "io": "bench_io",
    "io-experiments": "bench_io_experiments",
    "serve": "bench_serve",
    "warm-start": "bench_warm_start",
    "policies": "bench_policies",
}

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # as a shell reports SIGINT
EXIT_BROKEN_PIPE = 141  # as a shell reports SIGPIPE
_DRIVE_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (the process's own when None) and return its exit code.

    0 done, 1 an error of the user's input, files or machine (one line on stderr), 2 wrong usage, 130
    interrupted, 141 nobody reads the output.  FLASHMOE_TRACEBACK=1 shows where an error came from.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()  # whoever read it has left
        return EXIT_BROKEN_PIPE
    except (FlashmoeError, OSError) as error:
        message = _message(error)
        if message is None or env.traceback_wanted():
            raise
        if isinstance(error, OSError) and error.filename is None:
            _discard_output()
        print(f"flashmoe: error: {message}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("flashmoe: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as stop:  # argparse, after --help or a wrong option
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    return code


def _dispatch(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else EXIT_USAGE
    if name == "--version":
        from importlib.metadata import version

        print(f"flashmoe {version('flashmoe')}")
        return 0
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see flashmoe --help"
        print(f"flashmoe: error: unknown command {name!r}: {hint}", file=sys.stderr)
        return EXIT_USAGE
    import argparse

    words = argv[:2] if name == "bench" and argv[1:2] and argv[1] in BENCHES else argv[:1]
    module = importlib.import_module(f"flashmoe.cli.{BENCHES[words[1]] if words[1:] else name}")
    parser = argparse.ArgumentParser(prog=f"flashmoe {' '.join(words)}", description=module.__doc__)
    module.configure(parser)
    code: int = module.execute(parser.parse_intermixed_args(argv[len(words) :]))
    return code


def _overview() -> str:
    rows = "\n".join(f"  {name:<9}{text}" for name, text in COMMANDS.items())
    return (
        "usage: flashmoe COMMAND [options]\n\n"
        "Run Mixture-of-Experts models far larger than memory, exactly and within a memory budget.\n\n"
        f"commands:\n{rows}\n\n"
        "flashmoe COMMAND --help shows a command's options; flashmoe --version the version."
    )


def _discard_output() -> None:
    """Send what is still buffered to nowhere: Python would complain once more when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _message(error: FlashmoeError | OSError) -> str | None:
    """The error in one line, None when it is a bug of ours: an OSError that names no file of the user's."""
    if isinstance(error, FlashmoeError):
        return " ".join(str(error).split())
    if error.filename is None and error.errno in _DRIVE_IS_FULL:  # our own files are named: this is stdout
        return f"cannot write the output ({error.strerror}): free some space or send it elsewhere"
    return None if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
