"""Foretell what this machine will do with a model, from its config.json or bundle, before anything is downloaded."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.cli import options
from flashmoe.errors import BudgetError, ConfigError
from flashmoe.types import format_size

if TYPE_CHECKING:
    from flashmoe.engine.forecast import Machine, ModelWork
    from flashmoe.engine.memory import MemoryPlan

# Budgets to show when none is asked for: parts of what a run would take by default.
_DEFAULT_PARTS = (4, 2, 1)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe plan`."""
    parser.add_argument("path", type=Path, metavar="CONFIG.json|BUNDLE", help="a model")
    parser.add_argument(
        "--memory",
        type=options.sizes,
        metavar="SIZE,SIZE",
        help="budgets, like 3GiB,6GiB,auto (default: a quarter, half and all of what a run would take)",
    )
    parser.add_argument("--context", type=options.count, metavar="N", help="plan this many tokens of context")
    parser.add_argument("--threads", type=options.count, metavar="N", help="default: every processor")
    parser.add_argument(
        "--experts-per-token", type=options.count, metavar="K", help="other than the model's own is lossy"
    )
    parser.add_argument("--bits", metavar="BITS", help="of a config or checkpoint: as convert --bits would")
    options.add_kv_cache(parser)
    parser.add_argument(
        "--prompt", type=options.numbers, default=[512, 2048], metavar="N,N", help="prompts, in tokens"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="of a bundle: then run it at each budget, decoding and with the first of the prompts, and compare",
    )
    rates = parser.add_argument_group("rates of the machine", "measured unless given")
    rates.add_argument("--drive", type=options.rate, metavar="GB/s", help="random reads of whole experts")
    rates.add_argument("--memory-bandwidth", type=options.rate, metavar="GB/s", help="reads by all threads")
    rates.add_argument(
        "--int8", type=options.rate, metavar="GMAC/s", help="int8 multiply-adds by all threads"
    )
    rates.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="measure the drive that holds DIR, with a scratch file of half a GiB or more "
        "(default: a bundle's own files, else here)",
    )
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Plan each budget, measure, foretell; an error when no budget works."""
    from flashmoe.bench.plan import model_work
    from flashmoe.cli.inspect import config_of
    from flashmoe.convert import describe

    facts = describe(args.path, bits=args.bits)
    raw = config_of(args.path)
    if args.check and facts["kind"] != "bundle":
        raise ConfigError(f"{args.path}: --check runs a model, and needs a bundle")
    native = facts["experts_per_token"]
    facts["experts_per_token"] = per_token = _experts_per_token(args, facts)
    plans, refusals = _plans(args, facts)
    work = model_work(raw, facts, per_token, args.kv_cache or "f16")
    foretell = _checked if args.check else _foretold
    budgets, rates = foretell(args, facts["record_nbytes"], work, plans)
    report = {
        "model": {
            name: value for name, value in facts.items() if name not in ("codecs", "skipped", "unknown")
        },
        "native_experts_per_token": native,
        "machine": rates,
        "budgets": budgets,
        "refused": refusals,
    }
    if args.json:
        options.print_json(report)
    else:
        print(_show(args, report))
    return 0


def _machine(
    args: argparse.Namespace, record_nbytes: int, pool_nbytes: int
) -> tuple[Machine, dict[str, Any]]:
    """What is given of the rates, and the rest measured."""
    from flashmoe.bench.plan import Given, measure_machine

    billions = (args.drive, args.memory_bandwidth, args.int8)
    given = Given(*(None if rate is None else rate * 1e9 for rate in billions))
    return measure_machine(args.path, args.dir, record_nbytes, args.threads, given, pool_nbytes)


def _foretold(
    args: argparse.Namespace, record_nbytes: int, work: ModelWork, plans: list[MemoryPlan]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One entry for each budget, all with the rates measured once."""
    from flashmoe.bench.plan import forecast

    machine, rates = _machine(args, record_nbytes, max(plan.slots_nbytes for plan in plans))
    return [
        {"plan": dataclasses.asdict(plan), **forecast(machine, work, plan, args.prompt)} for plan in plans
    ], rates


def _checked(
    args: argparse.Namespace, record_nbytes: int, work: ModelWork, plans: list[MemoryPlan]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """As _foretold, each budget measured anew, since a shared machine changes from minute to minute, and then run."""
    from flashmoe.bench.plan import forecast
    from flashmoe.bench.plan_check import compare, measure_plan

    prompt = args.prompt[0] if args.prompt else 0
    budgets = []
    for plan in plans:
        machine, rates = _machine(args, record_nbytes, plan.slots_nbytes)
        entry = {
            "plan": dataclasses.asdict(plan),
            **forecast(machine, work, plan, args.prompt),
            "machine": rates,
        }
        entry["measured"] = measure_plan(args.path, plan, prompt, args.experts_per_token)
        entry["comparison"] = compare(entry, machine, work, plan, prompt)
        budgets.append(entry)
    return budgets, rates


def _experts_per_token(args: argparse.Namespace, facts: dict[str, Any]) -> int:
    wanted = args.experts_per_token or facts["experts_per_token"]
    if wanted > facts["experts"]:
        raise ConfigError(f"--experts-per-token {wanted}: the model has {facts['experts'] or 'no'} experts")
    return int(wanted)


def _plans(args: argparse.Namespace, facts: dict[str, Any]) -> tuple[list[MemoryPlan], list[str]]:
    """The split of each budget, and why others cannot work.  Raises BudgetError when none can."""
    from flashmoe.cli.inspect import config_of, model_demand_of, tokenizer_held
    from flashmoe.engine.memory import auto_budget, make_plan
    from flashmoe.models.registry import find_family

    raw = config_of(args.path)
    most = find_family(raw).config(raw).max_position_embeddings
    if args.context is not None and args.context > most:
        raise ConfigError(f"--context {args.context} is longer than the model's {most} positions")
    budgets = args.memory or [auto_budget().nbytes // part for part in _DEFAULT_PARTS]
    plans, refusals = [], []
    with tokenizer_held(args.path):
        for budget in budgets:
            try:
                plans.append(make_plan(model_demand_of(args, facts), budget))
            except BudgetError as error:
                refusals.append(str(error))
    if not plans:
        raise BudgetError(refusals[-1])
    return plans, refusals if args.memory else []


def _show(args: argparse.Namespace, report: dict[str, Any]) -> str:
    budgets = report["budgets"]
    lines = _headline(args, report)
    split = [["memory", "process", "resident", "state", "workspace", "expert slots"]]
    split += [_split(entry["plan"]) for entry in budgets]
    prompts = list(budgets[0]["prefill"])
    header = ["memory", "hits", "decode tok/s", "bound by"]
    if args.context:
        header += [f"decode at {args.context}", "bound by"]
    for tokens in prompts:
        header += [f"prefill {tokens}", "bound by"]
    header += [f"first {tokens}" for tokens in prompts]
    speeds = [header]
    for entry in budgets:
        ranges = [entry["decode"]]
        ranges += [entry["decode_full_context"]] if args.context else []
        ranges += [entry["prefill"][tokens] for tokens in prompts]
        low, high = (entry["decode"][end]["hit_rate"] for end in ("low", "high"))
        row = [format_size(entry["plan"]["budget_nbytes"]), _between(f"{low:.0%}", f"{high:.0%}")]
        for one in ranges:
            row += _speed(one)
        row += [_speed(entry["first_prefill"][tokens])[0] for tokens in prompts]
        speeds.append(row)
    lines += ["", *_table(split), "", *_table(speeds)]
    if report["model"]["experts"]:
        lines += [
            "",
            "low: a router that chooses evenly; high: one as uneven as OLMoE's; first: a prompt right after the start, "
            "into memory nobody has touched (docs/plan.md)",
        ]
    if args.check:
        lines += ["", *_table(_comparison(budgets))]
    return "\n".join(lines + report["refused"])


def _comparison(budgets: list[dict[str, Any]]) -> list[list[str]]:
    header = [
        "memory",
        "",
        "foretold",
        "measured",
        "low off by",
        "high off by",
        "drive GB/s",
        "low, same drive",
    ]
    return [header, *(_compared(row) for entry in budgets for row in entry["comparison"])]


def _compared(row: dict[str, Any]) -> list[str]:
    return [
        format_size(row["memory_bytes"]),
        row["what"],
        _between(f"{row['low']:.3g}", f"{row['high']:.3g}"),
        f"{row['measured']:.3g}",
        f"{row['low_off']:+.0%}",
        f"{row['high_off']:+.0%}",
        f"{row['drive_bytes_per_second'] / 1e9:.2f}",
        f"{row['same_drive_off']:+.0%}",
    ]


def _headline(args: argparse.Namespace, report: dict[str, Any]) -> list[str]:
    model, machine = report["model"], report["machine"]
    drive, given = machine["drive"], machine["given"]
    curve = ", ".join(f"{p['reads']}: {p['bytes_per_second'] / 1e9:.2f}" for p in drive["reads_together"])
    per_token = f"{model['experts_per_token']} of {model['experts']} experts per token"
    if not model["experts"]:
        per_token = "no experts"
    if model["experts_per_token"] != report["native_experts_per_token"]:
        per_token += f" (lossy: the model's own number is {report['native_experts_per_token']})"
    rows = [
        (model["kind"], str(args.path)),
        ("model", f"{model['model_type']}, {model['layers']} layers, {per_token}"),
    ]
    if model["experts"]:
        rows += [
            ("experts", f"{format_size(model['expert_nbytes'])}, {format_size(model['record_nbytes'])} each"),
            ("drive", f"{drive['bytes_per_second'] / 1e9:.2f} GB/s: {drive['source']}"),
        ]
    if "drive" not in given and curve and model["experts"]:
        fill = drive["fill_bytes_per_second"] / 1e9
        rows.append(("reads together", f"{curve} GB/s; into fresh memory {fill:.2f} GB/s"))
    rows += [
        ("memory", f"{machine['memory_bytes_per_second'] / 1e9:.1f} GB/s{_given('memory', given)}"),
        (
            "int8",
            f"{machine['int8_products_per_second'] / 1e9:.0f} GMAC/s{_given('products', given)}, "
            f"{machine['threads']} threads, {machine['isa']}",
        ),
    ]
    return [f"{name:<15} {text}" for name, text in rows]


def _given(name: str, given: list[str]) -> str:
    return " (given)" if name in given else ""


def _split(plan: dict[str, Any]) -> list[str]:
    share = plan["slots"] / plan["experts"] if plan["experts"] else 1.0
    sizes = [plan[f"{part}_nbytes"] for part in ("process", "resident", "state", "workspace")]
    slots = f"{plan['slots']} of {plan['experts']} ({share:.0%})" if plan["experts"] else "none"
    return [format_size(plan["budget_nbytes"]), *map(format_size, sizes), slots]


def _speed(one: dict[str, Any]) -> list[str]:
    low, high = one["low"], one["high"]
    return [
        _between(f"{low['tok_s']:.3g}", f"{high['tok_s']:.3g}"),
        _between(low["bound_by"], high["bound_by"]),
    ]


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low} - {high}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
