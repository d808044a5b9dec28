"""The command line: thin, and nothing heavy imported until needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm import __version__
from fedllm.errors import FedllmError

if TYPE_CHECKING:
    from fedllm.federation import Listener

app = typer.Typer(
    name="fedllm",
    help="Fine-tune one language model on data that must not move: by parameters, logits or "
    "activations, every cost measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="Experiment file (TOML).")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training.rate=0.001."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Where the run folder goes.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")]


def main() -> None:
    """Entry point: errors of the user's input end with code 2."""
    # torch's threads would spin while they wait for each other; beside any other work on the
    # machine a step then takes several times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # nothing here is compiled; where bitsandbytes is installed, peft imports it, and that would
    # load the compiler: a second of every start
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        app()
    except FedllmError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


@contextmanager
def _watched(quiet: bool) -> Iterator[Listener]:
    """Long work: a progress bar, and what to do after Ctrl-C (which ends with code 130)."""
    from fedllm.report.progress import progress

    try:
        with progress(quiet) as listener:
            yield listener
    except KeyboardInterrupt:
        typer.secho(
            "interrupted; committed rounds are kept: the same command with --resume goes on",
            fg="yellow", err=True,
        )  # fmt: skip
        raise


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fedllm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    file: File, set_: Set = None, out: Out = None, resume: Resume = False, quiet: Quiet = False,
    on: Annotated[
        Path | None, typer.Option("--on", metavar="DIR", help="On the sites of this server.")
    ] = None,
) -> None:  # fmt: skip
    """Run the experiment's one strategy."""
    from fedllm import compare, experiment, federation
    from fedllm.report import page, tables

    spec = experiment.load(file, set_ or ())
    if spec.sweep:
        raise FedllmError(f"{file}: it has a [[sweep]], which 'fedllm sweep' runs")
    folder = out or Path("runs") / spec.name
    if on is not None:
        from fedllm.engine import run_on

        with _extra():
            run_on(on, spec, folder, resume, typer.echo)
        tables.show(compare.read(folder))
        typer.echo(f"report: {page.write(folder)}")
        return
    with _watched(quiet) as listener:
        if len(spec.seeds) == 1:
            summary = federation.run(spec, spec.seeds[0], folder, resume=resume, listener=listener)
        else:
            summary = compare.seeds(spec, folder, resume=resume, listener=listener)
    tables.show(summary)
    typer.echo(f"report: {page.write(folder)}")


@app.command()
def compare(file: File, set_: Set = None, out: Out = None, resume: Resume = False,
            quiet: Quiet = False) -> None:  # fmt: skip
    """Run all three strategies and the bounds, side by side (the compare section chooses)."""
    from fedllm import compare as comparison
    from fedllm import experiment
    from fedllm.report import page, tables

    spec = experiment.load(file, set_ or ())
    folder = out or Path("runs") / f"{spec.name}-compare"
    with _watched(quiet) as listener:
        summary = comparison.run(spec, folder, resume=resume, listener=listener)
    tables.show(summary)
    typer.echo(f"report: {page.write(folder)}")


@app.command()
def sweep(
    file: File, set_: Set = None, out: Out = None, resume: Resume = False, quiet: Quiet = False,
    values: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="KEY=A,B,C", help="Values of a key; repeatable."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs side by side.")] = 1,
) -> None:  # fmt: skip
    """Run the experiment with several values of some of its keys, each with every seed."""
    from fedllm import experiment
    from fedllm import sweep as sweeping
    from fedllm.report import page, tables

    spec = experiment.load(file, set_ or ())
    if values:
        spec = spec.replace(sweep=(*spec.sweep, *(experiment.axis(text) for text in values)))
    folder = out or Path("runs") / f"{spec.name}-sweep"
    with _watched(quiet) as listener:
        summary = sweeping.run(spec, folder, resume=resume, jobs=jobs, listener=listener)
    tables.show(summary)
    typer.echo(f"report: {page.write(folder)}")


@app.command()
def check(file: File, set_: Set = None) -> None:
    """Say what would run, with an estimate of bytes, time, memory and disk; run nothing."""
    from fedllm import experiment
    from fedllm.report import tables
    from fedllm.report.check import look

    tables.check(look(experiment.load(file, set_ or ())))


@app.command()
def plan(
    file: File, set_: Set = None,
    limit: Annotated[
        list[str] | None,
        typer.Option("--limit", metavar="COST=MOST", help="E.g. bytes=50MB, labels=stay."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="KIND", help="table, md or json.")
    ] = "table",
) -> None:  # fmt: skip
    """Foresee the costs of all three strategies without weights; with limits, say what fits."""
    from fedllm import experiment
    from fedllm.planning import show
    from fedllm.planning.advise import advise, parse
    from fedllm.planning.plan import look

    limits = parse(limit) if limit else None
    show.known(form)
    spec = experiment.load(file, set_ or ())
    found = look(spec)
    advice = None if limits is None else advise(spec, limits)
    if form == "table":
        show.show(found, advice)
    else:
        typer.echo(show.text(found, advice, form))


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, comparisons, sweeps.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where the report goes.")
    ] = None,
    kind: Annotated[
        str, typer.Option("--format", metavar="KIND", help="html, md, csv, json or png.")
    ] = "html",
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", metavar="COST=LIMIT", help="Best quality, e.g. bytes=10MB."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="METRIC=VALUE", help="Cost of it, e.g. accuracy=0.8."),
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="One table even where data, split or rounds differ.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw again at each committed round, until the last.")
    ] = False,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="SINK", help="Also tensorboard[=DIR] or mlflow[=URI]."),
    ] = None,
) -> None:  # fmt: skip
    """Draw the report of finished runs, side by side, or of one that still goes on."""
    from fedllm.report import drawing, tables

    asked = drawing.asked(folders, out, kind, budget or (), target or (), anyway)
    found = drawing.watched(asked, to or (), typer.echo, watch)
    tables.show(found.summary)
    for table in asked.tables(found):
        tables.show_table(table)
    typer.echo(f"report: {asked.target}")


@app.command()
def demo(out: Out = None, resume: Resume = False, quiet: Quiet = False) -> None:
    """Compare the three strategies on the built-in model and text; no download."""
    from fedllm import compare as comparison
    from fedllm import experiment
    from fedllm.report import page, tables

    spec = experiment.load(Path(__file__).parent / "demo.toml")
    folder = out or Path("runs") / "demo"
    with _watched(quiet) as listener:
        summary = comparison.run(spec, folder, resume=resume, listener=listener)
    tables.show(summary)
    typer.echo(f"report: {page.write(folder)}")


@app.command()
def init(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Your rows: .csv, .json, .jsonl.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("fedllm.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a commented experiment file for your own data."""
    from fedllm.report.init import template

    if out.exists() and not force:
        raise FedllmError(f"{out}: exists; --out takes another name, --force replaces it")
    text = template(data, out)
    try:
        out.write_text(text)
    except OSError as error:
        raise FedllmError(f"{out}: cannot be written ({error.strerror})") from None
    typer.echo(f"wrote {out}\nnext: fedllm check {out}")


@app.command()
def predict(
    folder: RunFolder,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A text per line, or a CSV/JSON file.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; repeatable.")] = None,
    client: Annotated[
        str | None, typer.Option("--client", help="A client's own model, where there are several.")
    ] = None,
) -> None:
    """Answer with a run's model: a JSON line for each text."""
    import json

    from fedllm.predict import predict as answer

    for found in answer(folder, text or [], file, client):
        typer.echo(json.dumps(found, ensure_ascii=False))


@app.command()
def export(
    folder: RunFolder,
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="One whole model, without PEFT.")] = False,
    client: Annotated[
        str | None, typer.Option("--client", help="A client's own model, where there are several.")
    ] = None,
) -> None:
    """Copy a run's adapter, or the whole model with it merged in."""
    from fedllm.predict import export as write

    typer.echo(f"wrote {write(folder, out, merge, client)}")


server = typer.Typer(no_args_is_help=True, help="The server's end of a federation of sites.")
site = typer.Typer(no_args_is_help=True, help="A site's end of a federation.")
app.add_typer(server, name="server")
app.add_typer(site, name="site")
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The server's or site's own folder.")]


@contextmanager
def _extra() -> Iterator[None]:
    """What needs the extra ``flower`` says so."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise FedllmError(f"{error.name} is not installed: pip install 'fedllm[flower]'") from None


@server.command("init")
def server_init(
    folder: Folder,
    host: Annotated[
        list[str], typer.Option("--host", help="Name or address sites dial; repeatable.")
    ],
    port: Annotated[
        int, typer.Option("--port", help="Flower's; the next one is for sessions.")
    ] = 8000,
) -> None:
    """Make an authority, the server's certificate, and federation.toml."""
    with _extra():
        from fedllm.operate import init_server
    for path in init_server(folder, host, port):
        typer.echo(f"wrote {path}")


@server.command("start")
def server_start(folder: Folder) -> None:
    """Run Flower's SuperLink, with TLS and node authentication, until Ctrl-C."""
    from fedllm.engine import start_server

    raise typer.Exit(start_server(folder, typer.echo))


@server.command("check")
def server_check(folder: Folder, file: File, set_: Set = None) -> None:
    """Ask all sites what they would say to the experiment: a handshake, and nothing else."""
    from fedllm import experiment
    from fedllm.report import tables

    with _extra():
        from fedllm.engine import check_on

        found = check_on(folder, experiment.load(file, set_ or ()), typer.echo)
    tables.handshake(found)
    if found["refused"]:
        raise FedllmError("; ".join(found["refused"]))


@server.command("sign")
def server_sign(
    folder: Folder,
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="A site's request.pem.")],
    again: Annotated[bool, typer.Option("--again", help="A site's new key for its old.")] = False,
) -> None:
    """Sign a site's request: certificate.pem and ca.pem beside it, to send back."""
    with _extra():
        from fedllm.operate import sign
        from fedllm.transport.keys import fingerprint
    name, path = sign(folder, request, again)
    typer.echo(f"wrote {path}\nsite {name!r}, SHA-256 {fingerprint(path.read_bytes())}")
    typer.echo("send it and ca.pem back to the site")


@site.command("init")
def site_init(
    folder: Folder,
    name: Annotated[str, typer.Option("--name", help="The site's name in the federation.")],
) -> None:
    """Make a site's keys, its request for a certificate, and a commented site.toml."""
    with _extra():
        from fedllm.operate import init_site
    for path in init_site(folder, name):
        typer.echo(f"wrote {path}")
    typer.echo("next: write your files into site.toml, and send request.pem to the server")


@site.command("check")
def site_check(
    folder: Folder, file: File, set_: Set = None,
    to: Annotated[
        str | None, typer.Option("--server", metavar="HOST:PORT", help="Also dial the SuperLink.")
    ] = None,
) -> None:  # fmt: skip
    """Say what this site would answer to the experiment, and whether its keys are good."""
    from fedllm import experiment
    from fedllm.report import tables

    with _extra():
        from fedllm.rehearse import rehearse
    found = rehearse(folder, experiment.load(file, set_ or ()), to)
    tables.rehearsal(found)
    if bad := [f"{one.what}: {one.found}" for one in found if not one.good]:
        raise FedllmError("; ".join(bad))


@site.command("start")
def site_start(
    folder: Folder,
    to: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="The SuperLink.")],
    port: Annotated[int, typer.Option("--port", help="A free port of this machine.")] = 9094,
) -> None:
    """Run Flower's SuperNode, and start it again whenever it ends, until Ctrl-C."""
    from fedllm.engine import start_site

    raise typer.Exit(start_site(folder, to, port, typer.echo))


if __name__ == "__main__":
    main()
