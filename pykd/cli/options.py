"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelDir = Annotated[Path, typer.Argument(help="folder that pykd saved (or a local Hugging Face folder)")]
OutputDir = Annotated[Path, typer.Argument(help="folder to write; must not hold anything else")]
Include = Annotated[list[str] | None, typer.Option(help="only layers whose name matches; may be repeated")]
Exclude = Annotated[list[str] | None, typer.Option(help="not layers whose name matches; may be repeated")]
Recipe = Annotated[Path | None, typer.Option(help="take the data from this recipe, not from the model's own")]
Library = Annotated[
    Path | None,
    typer.Option(help="where reference models are looked for, not in caches and the network: a folder or a cache"),
]
Offline = Annotated[bool, typer.Option("--offline", help="reference models: from the caches of this machine only")]
Workers = Annotated[int, typer.Option(min=1, help="parts made at a time, each on a device of its own")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one key of the recipe")]
RunDir = Annotated[Path | None, typer.Option(help="folder for the results; default runs/NAME")]
Resume = Annotated[bool, typer.Option("--resume", help="continue an interrupted run")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the run that is in the folder")]
Short = Annotated[bool, typer.Option("--short", help="apply the recipe's own settings for a quick try")]
BatchSize = Annotated[int, typer.Option(min=1)]
LatencyRounds = Annotated[int, typer.Option(min=1, help="timed calls at batch 1")]
NumbersFile = Annotated[Path | None, typer.Option("--json", help="also write the numbers to this file")]
