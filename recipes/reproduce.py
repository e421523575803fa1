"""Show a table or figure of the paper beside our own runs, and run what is missing.

    python recipes/reproduce.py table3 --dataset cifar10_lt --ratio 100
    python recipes/reproduce.py table3 --dataset cifar10_lt --ratio 100 --rows NC-DRW --seeds 3 --data_dir <folder>
    python recipes/reproduce.py methods --rows "CE" "CE + NC" --data_dir <folder>
    python recipes/reproduce.py methods --train --jobs 16 --data_dir <folder>
    python recipes/reproduce.py figure2 --train
    python recipes/reproduce.py collapse
    python recipes/reproduce.py collect out/<run> ...

The first shows in seconds what lies in results/. There are Tables 2 to 7; Figures 2 and 3; `methods`, every method
without and with the terms on 30 epochs, and both figures of its runs (`figure2_30_epochs`, `figure3_30_epochs`);
`collapse`, NC1 to NC4 over training; and `classes`, accuracy by class size.
Rows that are named by `--rows` are run where they have no results of the same recipe, all rows with `--train`, none
with `--no-train`. Each run has a folder under `<output>/runs`, where the same command resumes it when interrupted;
its results then go to results/. Runs are of one process, or as many as the recipe expects; `--jobs 4` has four of them
at a time, each on its share of the cores, on one GPU (of several each in turn), and with its output in `<run>.log`.
`collect` takes over finished runs of recipes/train.py. Tables are written to `<output>` as well, under the name of the
columns they were cut down to, but not single rows.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
# Python puts this folder first, where evaluate.py would stand in for the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

if TYPE_CHECKING:
    from nc_hf.reproduction import Plan


def main(arguments: list[str]) -> None:
    """Show what the first argument names, run what is missing if asked for, and show it again; or collect runs."""
    options = parse(arguments)
    if options.what == "collect":
        return collect(options)
    options.show()
    missing = missing_runs(options)
    if not missing:
        return None
    names = ", ".join(f"{plan.setting.folder}/{plan.folder.name} seed {seed}" for plan, seed in missing)
    print(f"\n{len(missing)} run(s) missing: {names}")
    if not (bool(options.rows) if options.train is None else options.train):
        print("Nothing was trained. Give --train, or name the rows of a table to run by --rows.")
        return None
    troubles = run_all(options, missing)
    options.show()
    if troubles:
        raise SystemExit("\n".join(troubles))
    return None


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    from nc_hf.paper_figures import FIGURES
    from nc_hf.reproduction import TABLES, plan_row

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*TABLES, *FIGURES, "collect"]
    parser.add_argument("what", choices=choices, metavar="|".join(choices))
    parser.add_argument("folders", nargs="*", help="of finished runs, to collect")
    parser.add_argument("--dataset", help="a column of the table, such as cifar10_lt; all when not given")
    parser.add_argument("--ratio", type=int, help="imbalance ratio of the column")
    parser.add_argument("--rows", nargs="+", help="printed names; these are run where they are missing")
    parser.add_argument("--seeds", type=int, help="run seeds 0 to N-1, or 0 alone; all that are there are shown")
    parser.add_argument("--epochs", type=float, help="of stage one instead of the recipe's; kept apart from others")
    parser.add_argument("--data_dir", help="folder of the images; without it CIFAR comes from the Hub")
    parser.add_argument("--cache_dir", help="of `datasets`")
    parser.add_argument("--train", action=argparse.BooleanOptionalAction, help="run all that is missing, or nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one GPU")
    parser.add_argument("--output", type=Path, default=Path("out/reproduce"), help="for runs, tables and figures")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results", help="where results are kept")
    parser.add_argument("--recipes", type=Path, default=HERE, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if bool(options.folders) != (options.what == "collect"):
        parser.error("folders of runs go with collect, and with nothing else")
    options.table, options.figure = TABLES.get(options.what), FIGURES.get(options.what)
    choices = [name for name in ("dataset", "ratio", "rows", "seeds", "epochs") if getattr(options, name) is not None]
    if choices and not options.table:
        parser.error(f"--{', --'.join(choices)} are for tables and change nothing of {options.what}; leave them out")
    options.seeds = 1 if options.seeds is None else options.seeds
    if options.seeds < 1 or (options.epochs is not None and options.epochs <= 0):
        parser.error(f"--seeds and --epochs must be more than 0, got {options.seeds} and {options.epochs}")
    if options.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {options.jobs}")
    if options.table:
        plan_tables(parser, options, options.table)
    elif options.figure:
        options.noise, options.show = [], partial(show_figure, options)
        options.panels = {
            title: [plan_row(setting, row, options.recipes, options.results) for row in rows]
            for title, (setting, rows) in options.figure.panels.items()
        }
    return options


def plan_tables(parser: argparse.ArgumentParser, options: argparse.Namespace, table: Any) -> None:
    """Refuse columns and rows that the table does not have; plan those that were asked for."""
    from nc_hf.reproduction import plan_row

    unknown = [name for name in options.rows or [] if name not in table.rows]
    if unknown:
        parser.error(f"{options.what} has no row {', '.join(unknown)}; its rows are {', '.join(table.rows)}")
    options.plans = {
        setting: {
            name: plan_row(setting, table.rows[name], options.recipes, options.results, options.epochs)
            for name in (options.rows or table.rows)
        }
        for setting in table.settings
        if options.dataset in (None, setting.dataset) and options.ratio in (None, setting.ratio)
    }
    options.noise = [metric for metric in table.metrics if metric.startswith("noise ")]
    options.show = partial(show_tables, options)
    if not options.plans:
        columns = ", ".join(f"--dataset {s.dataset}" + f" --ratio {s.ratio}" * bool(s.ratio) for s in table.settings)
        parser.error(f"{options.what} has no such column; its columns are {columns}")


def show_tables(options: argparse.Namespace) -> None:
    """Print the tables, and write them to the output folder where no rows were picked."""
    from nc_hf.reproduction_report import render_table

    text = "\n".join(render_table(options.table, setting, rows) for setting, rows in options.plans.items())
    print(text)
    if not options.rows:
        chosen = [options.ratio and f"r{options.ratio}", options.epochs and f"{options.epochs:g}_epochs"]
        name = "-".join(filter(None, [options.what, options.dataset, *chosen]))
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{name}.md").write_text(text)


def show_figure(options: argparse.Namespace) -> None:
    """Draw a figure from the class means that are there."""
    from nc_hf.reproduction_report import draw_paper_figure

    path = options.output / options.what
    lines = draw_paper_figure(options.figure, options.panels, path)
    print("\n".join([options.figure.title, *lines]))
    if path.with_suffix(".png").is_file():
        print(f"{path}.png, {path}.svg")


def missing_runs(options: argparse.Namespace) -> list[tuple[Plan, int]]:
    """Runs without results that count, each once: of a figure the first choice of panels without any."""
    if options.figure:
        empty = [plans[0] for plans in options.panels.values() if not any(plan.means() for plan in plans)]
        return [(plan, 0) for plan in empty if plan.recipe_path.is_file()]
    missing = {}
    for plan in (plan for rows in options.plans.values() for plan in rows.values()):
        noise = [(one.seed, [one.value(plan.row.head, std) for std in options.noise]) for one in plan.found()]
        found = {seed for seed, values in noise if None not in values}
        if plan.recipe_path.is_file():
            missing |= {plan.target(seed): (plan, seed) for seed in range(options.seeds) if seed not in found}
    return list(missing.values())


def run_folder(output: Path, plan: Plan, seed: int) -> Path:
    """One folder a run; another one when the recipe changes."""
    from nc_hf.recipe import recipe_digest

    name = f"{plan.folder.name}-seed{seed}-{recipe_digest(plan.recipe(seed))}"
    return output / "runs" / plan.setting.folder / name


def commands(options: argparse.Namespace, plan: Plan, seed: int) -> list[list[str]]:
    """The commands of a run: training, which resumes, and the measurement under noise."""
    from nc_hf.paper_tables import NOISE_STDS

    run = run_folder(options.output, plan, seed)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes_of(plan, seed))]
    launch += ["--main_process_port", "0"]  # a free one: several may run at a time
    folders = {"--data.data_dir": options.data_dir, "--data.cache_dir": options.cache_dir}
    given = {name: os.path.abspath(os.path.expanduser(value)) for name, value in folders.items() if value}
    data = [word for option in given.items() for word in option]
    train = [*launch, str(HERE / "train.py"), str(plan.recipe_path), *plan.overrides(seed), *data]
    train += ["--output_dir", str(run.parent), "--name", run.name]
    measure = [
        sys.executable,
        str(HERE / "evaluate.py"),
        str(run / "stage1"),
        *data,
        "--json",
        str(run / "noise.json"),
    ]
    measure += ["--noise-std", *(f"{std:g}" for std in NOISE_STDS)]
    return [train, measure] if options.noise else [train]


def processes_of(plan: Plan, seed: int) -> int:
    """Number of processes that a recipe expects."""
    recipe = plan.recipe(seed)
    return (recipe.stage1 or recipe.stage2).get("expected_processes") or 1


def obstacle(plan: Plan, seed: int, run: Path, of_noise: bool) -> str | None:
    """Why a run is not started: its model lies elsewhere, or its processes have no device of their own.

    What a result that is there lacks is noise, where noise is asked for, and else the class means of a figure.
    """
    import torch

    present = next((one for one in plan.found() if one.seed == seed), None)
    if present and not run.is_dir() and not of_noise:
        return (
            f"{present.path}: its class means ({present.means_path.name}) are not there. Collect its run again, or "
            f"remove {present.path.name}, and it is trained again."
        )
    if present and not run.is_dir():
        return (
            f"{plan.target(seed)}: what is missing of these results takes the model, which is not in {run}. Let "
            "recipes/evaluate.py measure the noise where the run lies, with `--json <run>/noise.json`, and `collect` "
            "it; or remove that file, and it is trained again."
        )
    devices = torch.accelerator.device_count()
    if 0 < devices < processes_of(plan, seed):
        return (
            f"{plan.name} expects more processes than the {devices} device(s) here. Start recipes/train.py with "
            f"`--stage1.expected_processes {devices}` and a larger per_device_train_batch_size; such a run is of "
            "another recipe, so its results have no place in this table."
        )
    return None


def run_all(options: argparse.Namespace, missing: list[tuple[Plan, int]]) -> list[str]:
    """Run what is missing, `--jobs` at a time; what went wrong."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    slots: SimpleQueue[tuple[list[int], dict[str, str]]] = SimpleQueue()
    for job in range(options.jobs):
        slots.put((cores[job % len(cores) :: options.jobs] if cores else [], own_gpu(job, options.jobs)))

    stopped = Event()

    def work(plan: Plan, seed: int) -> str | None:
        if stopped.is_set():
            return None
        share, environment = slots.get()
        try:
            if share:
                os.sched_setaffinity(0, share)  # of this thread alone, and of the processes that it starts
            return run_and_collect(options, plan, seed, environment if processes_of(plan, seed) == 1 else {})
        except Exception as error:  # whatever it is, the other runs go on
            return f"{plan.target(seed)}: {type(error).__name__}: {error}"
        finally:
            slots.put((share, environment))

    before = signal.signal(signal.SIGTERM, partial(stop_runs, stopped))
    pool, troubles = ThreadPoolExecutor(options.jobs), []
    runs = [pool.submit(work, *run) for run in missing]
    try:
        for count, run in enumerate(as_completed(runs), 1):
            troubles += [trouble for trouble in [run.result()] if trouble]
            print(f"{count} of {len(runs)} run(s) ended, {len(troubles)} of them with an error", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)
    return troubles


def stop_runs(stopped: Event, number: int, frame: Any) -> None:
    """Upon SIGTERM begin no further run, have those under way stop after a checkpoint, and end.

    Launchers do not pass the signal on.
    """
    import psutil

    stopped.set()
    started = psutil.Process().children()
    trained = [process for launcher in started for process in launcher.children()]
    for process in [*trained, *started]:
        process.terminate()
    psutil.wait_procs(trained, timeout=60)
    raise SystemExit(128 + number)


def own_gpu(job: int, jobs: int) -> dict[str, str]:
    """The environment in which a job among several sees one GPU of several, each in turn."""
    import torch

    if jobs == 1 or (count := torch.cuda.device_count()) < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[job % count]}


def run_and_collect(options: argparse.Namespace, plan: Plan, seed: int, environment: dict[str, str]) -> str | None:
    """Run what is missing of a run and take over its results; what went wrong, if something did."""
    from nc_hf.reproduction import collect_run, matching_precision
    from nc_hf.results import read_results

    run = run_folder(options.output, plan, seed)
    if trouble := obstacle(plan, seed, run, bool(options.noise)):
        return trouble
    print(f"\n{plan.setting.title}, {plan.folder.name}, seed {seed}: {run}", flush=True)
    log = None if options.jobs == 1 else run.with_name(f"{run.name}.log")
    for command in commands(options, plan, seed):
        if run_command(command, log, environment):
            return f"{run}: failed, see {log or 'above'}; the same command resumes it."
    if matching_precision(plan.recipe(seed), read_results(run / "results.json")) is None:
        return f"{run} has results of another recipe than {plan.recipe_path}; they are not taken over."
    collect_run(run, plan.target(seed))
    return None


def run_command(command: list[str], log: Path | None, environment: dict[str, str]) -> int:
    """Exit status of a command whose output goes to the end of a log file, or where our own goes."""
    if log is None:
        return subprocess.run(command).returncode
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        environment = os.environ | environment
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode


def collect(options: argparse.Namespace) -> None:
    """Take finished runs of the tables' recipes over into the results."""
    from nc_hf.reproduction import collect_run, plan_of_run

    for folder in map(Path, options.folders):
        found = plan_of_run(folder, options.recipes, options.results)
        if found is None:
            raise SystemExit(f"{folder} is no run of a recipe of the paper's tables, or its recipe has changed since.")
        plan, seed = found
        collect_run(folder, plan.target(seed))
        print(plan.target(seed))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
    except BrokenPipeError:  # whoever reads, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
