"""The commands that hand models on: written for other programs, and put on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import jaxprune as jp
from jaxprune.cli import terminal
from jaxprune.cli.options import Json, ModelName, Overwrite, choice, option


def export(
    model: ModelName,
    output: Annotated[Path, option("The folder or file to write.", "--output", "-o", metavar="OUT")],
    to: Annotated[str, choice("to", "The programs that are to load it.", "Export")] = "hf",
    head: Annotated[str | None, option("The task head to keep; by default all.", panel="Export")] = None,
    dtype: Annotated[str | None, choice("dtype", "Type of the weights; by default as they are.", "Export")] = None,
    check: Annotated[bool, option("Read it back and compare.", "--check/--no-check", panel="Export")] = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Writes a model for programs that do not know jaxprune, and checks that it computes the same.

    Modules are filled up with zeros to the widest layer, which costs room but changes nothing; a GGUF file of a Llama,
    Mistral, Qwen2 or tied Qwen3 needs hardly any.

    Examples: [cyan]jaxprune export small -o plain[/cyan] is a folder that transformers loads.
    [cyan]jaxprune export small --to gguf --dtype q8_0 -o small.gguf[/cyan] is a decoder for llama.cpp.
    [cyan]jaxprune export small --to onnx --head sst2 -o small.onnx[/cyan] is a file for onnxruntime.
    [cyan]jaxprune export small --to stablehlo --head sst2 -o small.hlo[/cyan] is a program that jax alone runs.
    """
    with terminal.working():
        from jaxprune.checkpoints.export import check_exportable
        from jaxprune.checkpoints.files import write_atomic
        from jaxprune.checkpoints.folder import split_task
        from jaxprune.cli.render import cards, tables
        from jaxprune.models.cost import file_size

        check_exportable(output, overwrite, to)
        loaded, params = jp.load(model)

        made = jp.export(output, loaded, params, to=to, head=head, dtype=dtype, check=check, overwrite=overwrite)
        record = {"command": "export", "source": model, "output": str(output), "to": to, **made}
        record["file_bytes"] = file_size(output)
        if to == "hf":
            on_hub = not Path(split_task(model)[0]).expanduser().exists()
            write_atomic(output / cards.CARD, cards.export_card(record, on_hub=on_hub).encode())
    shown = [tables.export_table(record)] if record["units"] else []
    terminal.show(record, *shown, *tables.export_notes(record), as_json=as_json)


def push(
    path: Annotated[Path, typer.Argument(help="A model folder, or an exported file.", metavar="PATH")],
    name: Annotated[str, typer.Argument(help="The repository on the hub: USER/NAME.", metavar="NAME")],
    private: Annotated[bool, option("Make it private, if it is not there yet.", "--private", panel="Hub")] = False,
    revision: Annotated[str | None, option("A branch that is there.", "--revision", panel="Hub")] = None,
    as_json: Json = False,
) -> None:
    """Puts a model folder or an export on the Hugging Face hub, in one commit.

    It needs a token that may write: [cyan]hf auth login[/cyan].

    Example: [cyan]jaxprune push small you/sst2-small --private[/cyan]
    """
    with terminal.working():
        address = jp.push_to_hub(path, name, private=private, revision=revision)
    terminal.show({"command": "push", "path": str(path), "name": name, "url": address}, address, as_json=as_json)
