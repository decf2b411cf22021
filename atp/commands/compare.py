"""`atp compare CONFIG.yaml`: the same recipe under several strategies, sparsities and seeds -> table, plots, answers.

Every run is a process of its own. Its row is on the disk as soon as it ends, so that a crash, a kill or Ctrl-C loses
the runs that were going on and nothing else; the same command goes on from there.
"""

import argparse
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

from atp.checks import positive
from atp.commands.comparison.child import remove_weights, run_child, stop_children
from atp.commands.comparison.journal import append_row, read_journal, replace_journal
from atp.commands.comparison.plan import Run, check_plan, differences, make_plan, make_run
from atp.commands.comparison.results import report
from atp.config import COMPENSATIONS, CRITERIA, RANKINGS
from atp.errors import ConfigError
from atp.files import alone_in, keep_apart, write_json
from atp.recipe import Recipe
from atp.strategies import DENSE, FREEZE_AT, ONE_STAGE

_DEFAULT_STRATEGIES = (
    "dense,atp,paper,prune-then-tune:activation,tune-prune-recover:activation,tune-then-prune:activation"
)
_INTERRUPTED = 130
Value = TypeVar("Value", str, int, float)
Row = Mapping[str, Any]


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = (
        f"Strategies: {', '.join((DENSE, *ONE_STAGE))}; {', '.join(f'{t}:C' for t in FREEZE_AT)}, where C is "
        f"{', '.join(CRITERIA)}; C/RANKING and C+COMPENSATION replace the criterion's own ({', '.join(RANKINGS)}; "
        f"{', '.join(COMPENSATIONS)}). Any setting of the recipe can be given as --section.key value."
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="recipe; see configs/README.md")
    parser.add_argument("--strategies", default=_DEFAULT_STRATEGIES, help="comma-separated (default %(default)s)")
    parser.add_argument("--sparsity", help="comma-separated, e.g. 0.2,0.4,0.5 (default: the recipe's)")
    parser.add_argument("--seeds", default="0", help="comma-separated, e.g. 0,1,2 (default 0)")
    parser.add_argument(
        "--learning-rates",
        help="comma-separated, e.g. 5e-4,1e-3: every run at each, and every strategy shown at its best (default: the "
        "recipe's)",
    )
    parser.add_argument("--out", metavar="DIR", help="where everything goes (default: output_dir/compare)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time on this machine (default 1); they slow each other's timings"
    )
    parser.add_argument("--keep-models", action="store_true", help="keep the weights of every run")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="drop finished runs whose recipe has changed since, instead of refusing",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run, takes_overrides=True)


def run(arguments: argparse.Namespace) -> int:
    """Check, run what is not there yet, report; 1 where a run failed, 130 after Ctrl-C."""
    recipe = Recipe.from_yaml(arguments.config, arguments.overrides)
    out = Path(arguments.out or Path(recipe.output_dir) / "compare")
    sparsities = _values("--sparsity", arguments.sparsity, float) if arguments.sparsity else [_own_sparsity(recipe)]
    if arguments.jobs < 1:
        raise ConfigError(f"--jobs {arguments.jobs} is not allowed: give 1 or more")
    strategies, seeds = _values("--strategies", arguments.strategies, str), _values("--seeds", arguments.seeds, int)
    rates = _values("--learning-rates", arguments.learning_rates, float) if arguments.learning_rates else []
    if not all(map(positive, rates)):
        raise ConfigError(f"--learning-rates {arguments.learning_rates} is not allowed: give positive numbers")
    plan = make_plan(recipe, strategies, sparsities, seeds, out / "runs", rates)
    journal = out / "rows.jsonl"
    rows, changed = _sorted_out(read_journal(journal), recipe, out / "runs")
    if changed and not arguments.overwrite:
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        raise ConfigError(
            f"{journal} holds rows of another recipe ({changed[0]}{more}): give --overwrite to drop them and run "
            "again, or another --out"
        )
    check_plan(recipe, plan)
    for one in plan:
        keep_apart(Path(one.recipe.output_dir), *recipe.model.places)
    try:
        with alone_in(out / "runs", "atp compare", "--out"), _terminate_like_ctrl_c():
            if changed:
                replace_journal(journal, rows.values())
            _say_what_has_no_scores(recipe, rows, journal)
            rows |= _run_missing(plan, rows, journal, arguments.keep_models, arguments.jobs)
    except KeyboardInterrupt:
        done = sum(row["status"] == "ok" for row in read_journal(journal).values())
        print(f"stopped: {done} finished run(s) are in {journal}; the same command goes on from there")
        return _INTERRUPTED
    results = report(out, list(rows.values()))
    if arguments.json:
        write_json(arguments.json, results)
    return 1 if any(rows[r.name]["status"] == "failed" for r in plan) else 0


def _own_sparsity(recipe: Recipe) -> float:
    if recipe.atp is None:
        raise ConfigError("--sparsity is missing, and the recipe says `atp: false`: give e.g. --sparsity 0.2,0.4")
    return recipe.atp.sparsity


def _values(option: str, text: str, kind: type[Value]) -> list[Value]:
    """The values of a comma-separated option, each once."""
    try:
        values = [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: {error}: give values with commas between them") from None
    if not values:
        raise ConfigError(f"{option} is empty: give at least one value")
    return list(dict.fromkeys(values))


def _sorted_out(
    rows: Mapping[str, dict[str, Any]], recipe: Recipe, runs_dir: Path
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The rows that are of this recipe, asked for today or not, and what is different about the finished others.

    The report puts all rows side by side, so that one of another recipe would be compared with those of this one.
    """
    same, changed = {}, []
    for name, row in rows.items():
        try:
            now = make_run(recipe, row["strategy"], row["sparsity"], row["seed"], runs_dir, row.get("learning_rate"))
            different = differences(row, now)
        except ConfigError as error:  # a strategy that this version does not know
            different = [str(error)]
        if not different:
            same[name] = row
        elif row["status"] == "ok":
            changed.append(f"{name}: {', '.join(different[:3])}")
    return same, changed


def _run_missing(
    plan: Sequence[Run], rows: Mapping[str, Row], journal: Path, keep_models: bool, jobs: int
) -> dict[str, dict[str, Any]]:
    """Run what has no finished row, `jobs` at a time, writing each row as soon as its run has ended."""
    missing = [run for run in plan if rows.get(run.name, {}).get("status") != "ok"]
    done = len(plan) - len(missing)
    if done:
        print(f"{done} of {len(plan)} runs are finished already")
    found = {}
    with ThreadPoolExecutor(jobs) as pool, Console().status(_waiting(done, plan, missing, jobs)) as status:
        running = {pool.submit(run_child, one, jobs): one for one in missing}
        try:
            for future in as_completed(running):
                one, row = running[future], future.result()
                append_row(journal, row)
                if not keep_models:
                    remove_weights(one)
                done += 1
                found[one.name] = row
                print(f"{done} of {len(plan)}: {one.title}: {_outcome(row)}", flush=True)
                status.update(_waiting(done, plan, [run for run in missing if run.name not in found], jobs))
        except BaseException:  # Ctrl-C: nothing new starts, and what is running ends before we leave
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in running):
                stop_children()
                time.sleep(0.05)
            raise
    return found


def _say_what_has_no_scores(recipe: Recipe, rows: Mapping[str, Row], journal: Path) -> None:
    unscored = [name for name, row in rows.items() if row["status"] == "ok" and "tasks" not in row]
    if recipe.data.tasks and unscored:
        print(
            f"{len(unscored)} finished run(s), {unscored[0]} first, were made before the recipe named tasks and have "
            f"no scores: remove their lines from {journal} to have them run again"
        )


def _waiting(done: int, plan: Sequence[Run], left: Sequence[Run], jobs: int) -> Text:
    names = ", ".join(f"{one.title} ({one.recipe.output_dir}/train.log)" for one in left[:jobs])
    return Text(f"{done} of {len(plan)} finished; running {names}")


def _outcome(row: Row) -> str:
    if row["status"] == "ok":
        return f"perplexity {row['validation']['perplexity']:.2f}, {row['seconds']:.0f} s"
    return f"FAILED with exit status {row['exit_status']} after {row['seconds']:.0f} s: {row['error']}"


@contextmanager
def _terminate_like_ctrl_c() -> Iterator[None]:
    """SIGTERM stops the child too, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
