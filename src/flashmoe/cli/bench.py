"""Measure decode and prefill speed beside what the machine's memory and processor could do in the same run."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.cli import bench_report, options
from flashmoe.cli.demo import find_demo_bundle
from flashmoe.errors import ConfigError
from flashmoe.types import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flashmoe.bench.peer import Peer
    from flashmoe.engine.workbench import Workbench


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe bench`."""
    parser.add_argument(
        "path",
        nargs="?",
        type=Path,
        metavar="PATH",
        help="a bundle, or a config.json to make random weights for (default: the demo model)",
    )
    parser.add_argument(
        "--layers", type=options.count, metavar="N", help="of a config.json: the first N layers"
    )
    options.add_memory(parser)
    parser.add_argument("--threads", type=options.count, metavar="N", help="default: all cores")
    parser.add_argument(
        "--prompt",
        type=options.numbers,
        default=[128, 512, 2048],
        metavar="N,N",
        help="prefill these many tokens",
    )
    parser.add_argument(
        "--context",
        type=options.numbers,
        default=[0],
        metavar="N,N",
        help="decode with so many tokens before",
    )
    parser.add_argument(
        "--tokens", type=options.count, default=32, metavar="N", help="decoded each time (default 32)"
    )
    options.add_kv_cache(parser)
    bench_report.add_repeats(parser, 5)
    parser.add_argument("--profile", action="store_true", help="also show where a decoded token's time goes")
    parser.add_argument("--peer-bench", type=Path, metavar="FILE", help="llama-bench, run in alternation")
    parser.add_argument("--peer-model", type=Path, metavar="GGUF", help="the model it runs")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a roofline")


def execute(args: argparse.Namespace) -> int:
    """Measure and report."""
    from flashmoe.bench.plot import plot_roofline
    from flashmoe.engine.engine import Engine, EngineOptions
    from flashmoe.engine.workbench import Workbench

    peer = _peer(args)
    with _bundle(args) as bundle:
        context = max([*args.prompt, *(context + args.tokens + 8 for context in args.context)])
        engine_options = EngineOptions(
            args.memory, context=context, threads=args.threads, kv_cache=args.kv_cache
        )
        with Engine.open(bundle, engine_options) as engine:
            report = _report(args, Workbench(engine), peer)
    if args.plot:
        plot_roofline(report, args.plot)
    bench_report.finish(args, report, _show)
    return 0


def _report(args: argparse.Namespace, bench: Workbench, peer: Peer | None) -> dict[str, Any]:
    from flashmoe.bench.measure import BenchOptions, measure, options_of, profile

    wanted = BenchOptions(args.prompt, args.context, args.tokens, args.repeats)
    plan = bench.engine.plan
    head = bench_report.begin(_name(args), options_of(wanted), bench.engine._parts.ops.threads)
    report: dict[str, Any] = head | {
        "kv_cache": plan.kv_cache,
        "expert_slots": plan.slots,
        "experts": plan.experts,
        "resident": bench.resident,
        "peer": None if peer is None else str(peer.model.name),
        "results": measure(bench, wanted, peer, bench_report.note),
        "read_bandwidth": bench.read_bandwidth(),
        "int8_peak": bench.int8_peak(),
    }
    if args.profile:
        report["profile"] = profile(bench, args.tokens)
    return report


def _name(args: argparse.Namespace) -> str:
    path: Path = args.path or Path("demo model")
    name = path.resolve().parent.name if path.suffix == ".json" else path.name
    return name if args.layers is None else f"{name}, {args.layers} layers"


def _peer(args: argparse.Namespace) -> Peer | None:
    from flashmoe.bench.peer import Peer

    if (args.peer_bench is None) != (args.peer_model is None):
        raise ConfigError("--peer-bench and --peer-model belong together: give both or none")
    if args.peer_bench is None:
        return None
    peer = Peer(args.peer_bench, args.peer_model)
    peer.check()
    return peer


@contextmanager
def _bundle(args: argparse.Namespace) -> Iterator[Path]:
    """The bundle to measure; one made for the occasion is gone afterwards."""
    if args.path is None or args.path.suffix != ".json":
        if args.layers is not None:
            raise ConfigError("--layers is for a config.json: a bundle has the layers it has")
        yield args.path or find_demo_bundle()
        return
    from flashmoe.cli.progress import ProgressLine
    from flashmoe.convert import synth

    with tempfile.TemporaryDirectory(prefix="flashmoe-bench-", dir=Path.cwd()) as folder:
        with ProgressLine("writing") as progress:
            synth(args.path, Path(folder, "bundle"), layers=args.layers, progress=progress)
        yield Path(folder, "bundle")


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    machine = report["machine"]
    table = Table(
        title=f"{report['model']} on {machine['processor']}, {machine['threads']} threads, {machine['isa']}"
    )
    columns = ["", "tok/s", "quartiles", "rate", "bound", "of bound"]
    if report["peer"]:
        columns += ["llama.cpp", "ratio"]
    for name in columns:
        table.add_column(name, justify="left" if not name else "right")
    for row in report["results"]:
        table.add_row(*_cells(row))
    console = bench_report.console(110)
    console.print(table)
    if not report["resident"]:
        console.print(
            f"{report['expert_slots']} of {report['experts']} experts in memory: the drive is measured too"
        )
    if any(row["drive_bytes_read"] for row in report["results"]):
        read = sum(row["drive_bytes_read"] for row in report["results"])
        console.print(f"{format_size(read)} of experts were read from the drive in the timed parts")
    if "profile" in report:
        _show_profile(report["profile"])


def _cells(row: dict[str, Any]) -> list[str]:
    speed, share, decode = row["tok_s"], row["share_of_bound"], row["kind"] == "decode"
    scale, unit = (
        (1e9, "GB/s") if decode else (0.5e12, "TOPS")
    )  # an operation is a multiplication or an addition
    cells = [
        row["name"],
        f"{speed['median']:.4g}",
        f"{speed['low']:.4g} - {speed['high']:.4g}",
        f"{row['rate'] / scale:.3g} {unit}",
        f"{row['bound_rate'] / scale:.3g} {unit}",
        f"{share['median']:.0%}",
    ]
    if "peer_tok_s" in row:
        cells += [f"{row['peer_tok_s']['median']:.4g}", f"{row['ratio_to_peer']['median']:.2f}"]
    return cells


def _show_profile(profile: dict[str, Any]) -> None:
    print(f"a decoded token takes {profile['seconds_per_token'] * 1e3:.3f} ms:")
    for name, seconds in profile["operations"].items():
        print(f"  {name:<18}{seconds * 1e3:8.3f} ms  {seconds / profile['seconds_per_token']:6.1%}")
    outside = profile["python_share"]
    print(f"  {'Python, binding':<18}{outside * profile['seconds_per_token'] * 1e3:8.3f} ms  {outside:6.1%}")
