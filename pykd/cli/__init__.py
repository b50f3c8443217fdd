"""The command `pykd`: the only part of the package that prints.

Wrong input ends with exit code 2 and one sentence on stderr (`--debug` adds the traceback), Ctrl-C with 130, a saved
model that does not predict what it predicted in memory with 1. A command is a function in one of these files and its
name in COMMANDS.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pykd.cli import evidence, models, runs, service
from pykd.cli.console import say, sentence, talk

#: Exit code after Ctrl-C, as shells count it: 128 + SIGINT.
INTERRUPTED = 130
#: In the order of `pykd --help`.
COMMANDS: tuple[Callable[..., None], ...] = (
    runs.run,
    runs.study,
    evidence.evaluate,
    evidence.compare,
    evidence.safety,
    models.prune,
    models.quantize,
    models.compress,
    models.export,
    evidence.verify,
    service.serve,
    service.baseline,
    runs.monitor,
    evidence.info,
)

app = typer.Typer(
    name="pykd",
    help="Distil, prune and quantize models; prove that the result is smaller, faster and still right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in COMMANDS:
    app.command()(command)
app.command(hidden=True)(runs.part)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks and debug messages")] = False,
) -> None:
    talk(logging.DEBUG if debug else logging.INFO)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, after one sentence on stderr where something is wrong."""
    code = _main(arguments)
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        # Taking a process group down can wait forever for its own threads, which want Python's lock.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _main(arguments: list[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # accepted anywhere, as newcomers write it
    words = [*(["--debug"] if debug else []), *(word for word in words if word != "--debug")]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(words, standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return say(*sentence(error))
    if code == INTERRUPTED:  # also what typer makes of Ctrl-C itself
        again = "; what is finished is kept, continue with --resume" if {"run", "study"} & set(words[:2]) else ""
        return say(f"interrupted{again}", INTERRUPTED)
    return int(code or 0)
