"""Chat with a model in the terminal, or answer prompts line by line from a pipe."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.cli import model_options, options, prefix_options
from flashmoe.cli.demo import find_demo_bundle
from flashmoe.errors import ConfigError

if TYPE_CHECKING:
    from flashmoe.chat.options import LoadOptions
    from flashmoe.chat.toolbox import Toolboxes
    from flashmoe.cli.chat_state import Chat

_EDITOR = ("prompt_toolkit", "platformdirs")
_TOOL_OUTPUT = 16 << 10
_TOOL_SECONDS = 60
_ROUNDS = 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe chat`."""
    parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="default: the demo model")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote"
    )
    parser.add_argument(
        "--max-tokens",
        type=options.count,
        metavar="N",
        help="of one answer (default: what the context holds)",
    )
    parser.add_argument(
        "--reasoning",
        choices=("show", "hide"),
        help="print it dimmed, or not at all (default: show; in a pipe, where it goes to stderr, hide)",
    )
    parser.add_argument("--no-history", action="store_true", help="keep no file of what is typed")
    model_options.add_sampling(parser)
    _configure_tools(parser.add_argument_group("tools", "what the model may do"))
    model_options.add_machine(parser)
    prefix_options.configure(parser)
    model_options.add_lossy(parser)


def _configure_tools(tools: argparse._ArgumentGroup) -> None:
    tools.add_argument(
        "--mcp",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help='MCP servers, in the form {"mcpServers": {...}}; may be repeated',
    )
    tools.add_argument(
        "--mcp-server",
        action="append",
        default=[],
        metavar="COMMAND",
        help="an MCP server to start; may be repeated",
    )
    tools.add_argument("--shell", action="store_true", help="shell commands; you are asked before each one")
    tools.add_argument(
        "--tool-timeout",
        type=options.rate,
        default=_TOOL_SECONDS,
        metavar="SECONDS",
        help="for one call (default: %(default)s)",
    )
    tools.add_argument(
        "--tool-output",
        type=options.size,
        default=_TOOL_OUTPUT,
        metavar="SIZE",
        help="longer results are cut (default: 16KiB)",
    )
    tools.add_argument(
        "--tool-rounds",
        type=options.count,
        default=_ROUNDS,
        metavar="N",
        help="answers with calls in one turn (default: %(default)s)",
    )


def execute(args: argparse.Namespace) -> int:
    """Talk until the user leaves, or stdin ends."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if args.shell and not terminal:
        print("flashmoe chat: error: --shell asks before every command: it needs a terminal", file=sys.stderr)
        return 2
    if terminal:
        _require(_EDITOR)
        from flashmoe.cli import chat_terminal  # noqa: F401 - before the model: its memory is planned last
    with ExitStack() as stack:
        toolbox = _open_tools(args, stack)
        chat = _open_chat(args, toolbox, stack)
        if terminal:
            from rich.console import Console

            from flashmoe.cli.chat_terminal import run_terminal

            run_terminal(chat, Console(highlight=False), history=not args.no_history)
        else:
            from flashmoe.cli.chat_pipe import run_pipe

            run_pipe(chat)
    return 0


def _open_tools(args: argparse.Namespace, stack: ExitStack) -> Toolboxes:
    """All tools that were asked for.  Raises ConfigError or ToolError."""
    from flashmoe.chat.mcp_config import parse_command, read_config
    from flashmoe.chat.toolbox import Toolbox, Toolboxes

    servers = [server for file in args.mcp for server in read_config(file)]
    servers += [parse_command(text, f"server{i}") for i, text in enumerate(args.mcp_server, 1)]
    boxes: list[Toolbox] = []
    if servers:
        _require(("mcp",))
        from flashmoe.chat.mcp_tools import McpTools

        boxes.append(stack.enter_context(McpTools(servers, args.tool_timeout)))
    if args.shell:
        boxes.append(_shell(args))
    return Toolboxes(boxes, args.tool_output)


def _shell(args: argparse.Namespace) -> Any:
    from rich.console import Console

    from flashmoe.chat.shell_tool import ShellTool
    from flashmoe.cli.chat_terminal import ask_approval

    directory = Path.cwd()
    approve = ask_approval(Console(highlight=False), directory)
    return ShellTool(approve, directory, args.tool_timeout, args.tool_output)


def _open_chat(args: argparse.Namespace, toolbox: Toolboxes, stack: ExitStack) -> Chat:
    """The model with its conversation.  Raises what LLM does, PromptError, and ConfigError for tools it cannot call."""
    from flashmoe.chat.llm import LLM
    from flashmoe.chat.session import ChatSession
    from flashmoe.chat.transcript import Transcript
    from flashmoe.cli.chat_state import Chat

    transcript = Transcript.load(args.load) if args.load else Transcript()
    if args.system is not None:
        transcript.system = args.system
    bundle = args.bundle or find_demo_bundle()
    reserved = prefix_options.reserved_nbytes(args)
    wanted: LoadOptions = {**model_options.load_options(args), "prefix_cache": reserved}
    llm = stack.enter_context(LLM(bundle, **wanted))
    if llm.lossy:
        print(f"flashmoe: {model_options.lossy_note(llm)}", file=sys.stderr)
    options.print_notice(llm.notice)
    session = stack.enter_context(ChatSession(llm, prefix_options.open_cache(args, llm, reserved)))
    if toolbox.tools and session.prompts.dialect is None:
        raise ConfigError(
            f"{bundle}: its chat template has no tool calls that flashmoe reads: "
            "leave --mcp, --mcp-server and --shell out"
        )
    sampling = model_options.given_sampling(args) | {"max_tokens": args.max_tokens}
    llm.sampling_params(**sampling)  # raises ConfigError, before the user has typed anything
    shown = sys.stdin.isatty() if args.reasoning is None else args.reasoning == "show"
    return Chat(
        session,
        Path(bundle).resolve().name,
        transcript,
        toolbox,
        args.tool_rounds,
        sampling,
        model_options.template_variables(args),
        shown,
    )


def _require(packages: tuple[str, ...]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"chatting needs {', '.join(missing)}: pip install 'flashmoe[chat]'")
