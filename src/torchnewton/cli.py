"""The command line: parses arguments and prints. The work is done in `torchnewton.train`."""

from __future__ import annotations

import shlex
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

EXTRA = ("typer", "rich", "matplotlib", "sklearn", "numpy", "jinja2")

try:
    import typer
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress
    from rich.table import Table
    from typer.exceptions import TyperException

    from torchnewton.train.check import check
    from torchnewton.train.checkpoint import RunFolder, check_free, free_name, new_folder
    from torchnewton.train.compare import HEADERS, compare, rows
    from torchnewton.train.data import NAMES as DATA
    from torchnewton.train.errors import UsageError, is_out_of_memory
    from torchnewton.train.methods import NAMES as METHODS
    from torchnewton.train.models import NAMES as MODELS
    from torchnewton.train.page import FILES, title, write_page
    from torchnewton.train.plan_report import HEADERS as PLAN_HEADERS
    from torchnewton.train.plan_report import Request, check_picture, draw_plan, predict
    from torchnewton.train.plan_report import rows as plan_rows
    from torchnewton.train.prepare import LOSSES
    from torchnewton.train.ranks import RESTARTS, check_ranks, has_ended, is_launched, launch, leave
    from torchnewton.train.recipes import RECIPES, with_recipe
    from torchnewton.train.runs import (
        CAN_CHANGE,
        Settings,
        make_run,
        resumed,
        stored_settings,
        train_new,
        train_resumed,
    )
    from torchnewton.train.spectrum import CURVATURES, Question, look_at
    from torchnewton.train.spectrum_report import HEADERS as SPECTRUM_HEADERS
    from torchnewton.train.spectrum_report import how, write
    from torchnewton.train.spectrum_report import rows as spectrum_rows
except ModuleNotFoundError as error:
    if error.name not in EXTRA:
        raise
    sys.exit(f"The command line needs {error.name}: pip install 'torchnewton[cli]'")
except KeyboardInterrupt:
    sys.exit(130)

app = typer.Typer(
    help="Newton-type training for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[str, typer.Option(help=f"The task: {', '.join(DATA)}.")]
DataDir = Annotated[str, typer.Option(help="Folder of the standard files.")]
Model = Annotated[str, typer.Option(help=f"{', '.join(MODELS)}; hidden sizes as in mlp:256-256.")]
BatchSize = Annotated[int | None, typer.Option(help="Samples a step.", show_default="by method")]
Seed = Annotated[int, typer.Option(help="Seed of parameters and shuffling.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")]
Threads = Annotated[int, typer.Option(help="Threads of PyTorch.")]
Out = Annotated[str | None, typer.Option(help="Folder to write.", show_default="runs/… with a number")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")]


@app.command("train")
def train_command(
    context: typer.Context,
    data: Data = Settings.data,
    data_dir: DataDir = Settings.data_dir,
    model: Model = Settings.model,
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = Settings.method,
    lr: Annotated[float | None, typer.Option(help="Rate of a first-order method.", show_default="by method")] = None,
    batch_size: BatchSize = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.", show_default="by method")] = None,
    seconds: Annotated[float | None, typer.Option(help="CPU seconds of training instead of epochs.")] = None,
    until_loss: Annotated[float | None, typer.Option(help="Stop once the loss of all training data is so low.")] = None,
    seed: Seed = Settings.seed,
    device: Device = Settings.device,
    threads: Threads = Settings.threads,
    recipe: Annotated[str | None, typer.Option(help=f"Settings by name: {', '.join(RECIPES)}.")] = None,
    loss: Annotated[str, typer.Option(help=f"{', '.join(LOSSES)} (summed over the classes).")] = Settings.loss,
    c: Annotated[float | None, typer.Option("--C", help="Weight decay 1/(C·samples).", show_default="none")] = None,
    subset: Annotated[float | None, typer.Option(help="Steps on all data, curvature of this part of them.")] = None,
    samples: Annotated[int | None, typer.Option(help="The first so many for training.", show_default="all")] = None,
    test_samples: Annotated[int | None, typer.Option(help="The first so many for the test.")] = None,
    validation: Annotated[float | None, typer.Option(help="Part of the training set to choose best.pt by.")] = None,
    center: Annotated[bool, typer.Option(help="Subtract the mean training input, of images for each pixel.")] = False,
    ranks: Annotated[int, typer.Option(help="Processes, each with its part of every batch.", min=1)] = Settings.ranks,
    quorum: Annotated[
        float | None, typer.Option(help="distributed-newton: end the solves when this part of the ranks are done.")
    ] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Annotated[str | None, typer.Option(help="Folder of a run to continue.", metavar="FOLDER")] = None,
) -> int:
    """Train a model. Without options: a small CNN on digits with Newton."""
    given = {n for n in context.params if (p := context.get_parameter_source(n)) and p.name == "COMMANDLINE"}
    if resume is not None:
        for name in given - {"resume", *CAN_CHANGE}:
            can = ", ".join(f"--{name.replace('_', '-')}" for name in CAN_CHANGE)
            option = "C" if name == "c" else name.replace("_", "-")
            raise UsageError(f"--{option} cannot change in a resumed run: only {can} can.")
        changes = {name: context.params[name] for name in given - {"resume"}}
        ranks = stored_settings(RunFolder(Path(resume)))[1].ranks
        if ranks > 1 and not is_launched():
            _, settings, resumed_run = resumed(RunFolder(Path(resume)), changes)
            check_ranks(settings.device, resumed_run.optimizer, settings.method)
            return launch(sys.argv[1:], ranks, RESTARTS)
        return train_resumed(resume, changes, _console())
    settings = Settings(
        data,
        data_dir,
        model,
        method,
        lr,
        batch_size,
        epochs,
        seconds,
        seed,
        device,
        threads,
        until_loss,
        loss,
        c,
        subset,
        samples,
        test_samples,
        validation,
        center,
        ranks,
        quorum,
    )
    if recipe is not None:
        settings = with_recipe(recipe, settings, given)
    if ranks > 1 and not is_launched():
        check_free(Path(out or "runs"), overwrite or out is None)
        check_ranks(settings.device, make_run(settings)[1].optimizer, settings.method)
        return launch(sys.argv[1:], ranks, RESTARTS if out is not None else 0)
    return train_new(settings, out, overwrite, _console())


@app.command("compare")
def compare_command(
    methods: Annotated[str, typer.Option(help=f"Some of {', '.join(METHODS)}.")] = "newton,adam,sgd",
    data: Data = Settings.data,
    data_dir: DataDir = Settings.data_dir,
    model: Model = Settings.model,
    batch_size: BatchSize = None,
    seconds: Annotated[float, typer.Option(help="CPU seconds of training for each run.")] = 5.0,
    seeds: Annotated[int, typer.Option(help="Seeds for each method.")] = 3,
    target: Annotated[float | None, typer.Option(help="Test accuracy (0 to 1) or error to time.")] = None,
    seed: Seed = Settings.seed,
    device: Device = Settings.device,
    threads: Threads = Settings.threads,
    out: Out = None,
    overwrite: Overwrite = False,
) -> int:
    """Compare methods on one task with equal time, first-order ones over five rates."""
    check_free(Path(out or "runs"), overwrite or out is None)
    settings = Settings(
        data,
        data_dir,
        model,
        batch_size=batch_size,
        seconds=seconds,
        seed=seed,
        device=device,
        threads=threads,
    )
    console = _console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=1.0)

        def on_run(label: str, fraction: float) -> None:
            progress.update(task, description=escape(label), completed=fraction)

        names = [name.strip() for name in methods.split(",") if name.strip()]
        command = "torchnewton " + shlex.join(sys.argv[1:])
        try:
            comparison = compare(settings, names, seeds, target, command, on_run)
        except KeyboardInterrupt:
            console.print("Interrupted: nothing was written.")
            return 130
    folder = Path(out) if out is not None else free_name(f"{comparison.data.name}-compare")
    new_folder(folder, overwrite, FILES)
    write_page(comparison, folder)
    table = Table(title=title(comparison), title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    for header in HEADERS:
        table.add_column(header, justify="left" if header == "method" else "right", no_wrap=True)
    for row in rows(comparison):
        table.add_row(*row)
    _show(console, table)
    console.print(f"Saved in {folder}: {', '.join(FILES)}", soft_wrap=True)
    return 0


@app.command("check")
def check_command(
    data: Data = Settings.data,
    data_dir: DataDir = Settings.data_dir,
    model: Model = Settings.model,
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = Settings.method,
    lr: Annotated[float | None, typer.Option(help="Rate of a first-order method.", show_default="by method")] = None,
    batch_size: BatchSize = None,
    seed: Seed = Settings.seed,
    device: Device = Settings.device,
    threads: Threads = Settings.threads,
) -> int:
    """Check derivatives, determinism, memory and time before a training; fails where one is wrong."""
    chosen = Settings(data, data_dir, model, method, lr, batch_size, seed=seed, device=device, threads=threads)
    settings, run = make_run(chosen)
    console = _console()
    title = f"{run.data.name}, {settings.model}, {settings.method}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    for header in ("check", "found", ""):
        table.add_column(header)
    failed = 0
    for row in check(run):
        failed += row.passed is False
        table.add_row(row.name, row.value, {True: "pass", False: "FAIL", None: ""}[row.passed])
    _show(console, table)
    console.print(f"Checks that failed: {failed}." if failed else "All checks passed.")
    return 1 if failed else 0


@app.command("spectrum")
def spectrum_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders written by `torchnewton train`.", metavar="RUN...")],
    curvature: Annotated[str, typer.Option(help=", ".join(CURVATURES))] = Question.curvature,
    samples: Annotated[int, typer.Option(help="Training samples at most, evenly spaced.")] = Question.samples,
    probes: Annotated[int, typer.Option(help="Random vectors.")] = Question.probes,
    iterations: Annotated[int, typer.Option(help="Lanczos iterations for each of them.")] = Question.iterations,
    double: Annotated[bool, typer.Option("--double", help="Compute in float64.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random vectors.")] = Question.seed,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …", show_default="the run's")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="the run's, or runs/…")] = None,
    overwrite: Overwrite = False,
) -> int:
    """Eigenvalues of the curvature at the end of saved runs: flat or sharp? Several runs stand side by side."""
    question = Question(curvature, samples, probes, iterations, double, seed)
    check_free(out or (runs[0] if len(runs) == 1 else Path("runs")), overwrite or out is None)
    console = _console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=1.0)

        def on_progress(label: str, fraction: float) -> None:
            progress.update(task, description=escape(label), completed=fraction)

        try:
            points = look_at(runs, question, on_progress, device)
        except KeyboardInterrupt:
            console.print("Interrupted: nothing was written.")
            return 130
    folder = out or (runs[0] if len(runs) == 1 else free_name("spectrum"))
    if folder != runs[0]:
        new_folder(folder, overwrite, RunFolder.SPECTRUM_FILES)
    write(points, question, "torchnewton " + shlex.join(sys.argv[1:]), folder)
    table = Table(box=SIMPLE_HEAD, collapse_padding=True)
    for header in SPECTRUM_HEADERS:
        table.add_column(header, justify="left" if header in ("run", "seed") else "right", no_wrap=True)
    for row in spectrum_rows(points):
        table.add_row(*row)
    for line in how(points, question):
        console.print(line, soft_wrap=True)
    _show(console, table)
    console.print(f"Saved in {folder}: {', '.join(RunFolder.SPECTRUM_FILES)}", soft_wrap=True)
    return 0


@app.command("plan")
def plan_command(
    model: Annotated[str, typer.Option(help="Layer sizes as in 784-1000-10, or a model of `train`.")] = Request.model,
    data: Annotated[str | None, typer.Option(help="The task of a model of `train`.", show_default="none")] = None,
    data_dir: DataDir = Settings.data_dir,
    batch_size: Annotated[int, typer.Option(help="Samples a step, of all ranks.", min=1)] = Request.batch_size,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks.")] = Request.ranks,
    bandwidth: Annotated[float, typer.Option(help="Of a rank's link, in Gbit/s.")] = Request.bandwidth,
    latency: Annotated[float, typer.Option(help="Of a message between two ranks, in µs.")] = Request.latency,
    flops: Annotated[
        str, typer.Option(help="Of a rank, in GFLOP/s, or auto: gradients are timed here.")
    ] = Request.flops,
    iterations: Annotated[int, typer.Option(help="Of CG in a step.", min=1)] = Request.iterations,
    slow: Annotated[float, typer.Option(help="One rank's products take so many times as long.", min=1)] = Request.slow,
    threads: Threads = Settings.threads,
    out: Annotated[Path | None, typer.Option(help="Picture to write, .svg, .png or .pdf.", show_default="none")] = None,
) -> int:
    """Predict seconds, bytes and messages of a Newton step on many ranks, for each way to distribute it."""
    if out is not None:
        check_picture(out)
    request = Request(model, data, data_dir, batch_size, ranks, bandwidth, latency, flops, iterations, slow, threads)
    found = predict(request)
    console = _console()
    table = Table(title=request.title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    for header in PLAN_HEADERS:
        table.add_column(header, justify="left" if header in ("mode", "") else "right", no_wrap=True)
    for row in plan_rows(found):
        table.add_row(*row)
    _show(console, table)
    if out is not None:
        draw_plan(found, request.title, out)
        console.print(f"Saved in {out}", soft_wrap=True)
    return 0


def _console() -> Console:
    """The terminal, or a file with lines of 100 characters; paths may hold what is markup elsewhere."""
    return Console(width=None if sys.stdout.isatty() else 100, markup=False, emoji=False, highlight=False)


def _show(console: Console, table: Table) -> None:
    """Prints a table as wide as it is, so that no digit is cut off."""
    console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)


def run(arguments: list[str]) -> int:
    """Runs the command line; returns its exit code, 2 with one sentence for what the user can put right."""
    try:
        code = app(arguments, prog_name="torchnewton", standalone_mode=False)
    except UsageError as error:
        message = str(error)
    except TyperException as error:
        message = error.format_message()
    except (MemoryError, RuntimeError) as error:
        if has_ended():
            return 0
        if not is_out_of_memory(error):
            raise
        message = "Memory is too small for this model and batch: choose smaller ones, for example by --batch-size."
    else:
        return 0 if code and leave(code) else code or 0
    if leave(2, message):
        return 0
    print(message, file=sys.stderr)
    return 2


def main() -> None:
    """The command `torchnewton`."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))
