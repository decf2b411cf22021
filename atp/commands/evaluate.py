"""`atp eval MODEL...`: quality, speed and size of any causal LMs on the same rows, and gates for regressions.

Models are measured one after the other in this process; each is freed before the next is loaded. Peak memory is that
of loading and of all that is measured, from what is resident before: on CUDA what torch allocated, else the whole
process with its libraries, so that it is comparable between models of one call and not with other tools.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from atp.commands.evaluation.figures import Measured, differences, figures
from atp.commands.evaluation.gates import Verdict, check_gates, judge, line, parse_gate
from atp.commands.evaluation.sources import Tasks, find_tasks
from atp.commands.evaluation.tables import (
    print_costs,
    print_differences,
    print_perplexity,
    print_scores,
    print_verdicts,
)
from atp.commands.models import bytes_of, to_best_device
from atp.commands.versions import versions_of
from atp.data import Row, make_windows, read_rows, windows_fingerprint
from atp.errors import ConfigError
from atp.evaluation import (
    Difference,
    model_cost,
    peak_memory_mib,
    perplexity_by_row,
    release_memory,
    reset_peak_memory,
)
from atp.evaluation.statistics import scipy
from atp.files import write_json
from atp.models import load_model, load_tokenizer
from atp.recipe import DTYPES

_EPILOG = """\
tasks (--tasks, repeatable):
  FILE.jsonl or NAME=FILE.jsonl
          rows with prompt, completion and, for multiple choice, choices and
          label; or rows with text
  FOLDER  its files, or the test.jsonl (else validation.jsonl) in it and in its
          sub-folders, each named by its folder
  NAME    a task, group or tag of lm-evaluation-harness

gates (--fail-if, repeatable): NAME < NUMBER or NAME > NUMBER
  'ppl > +3%'          a number with a sign is a change from the --baseline,
                       with % a share of its figure
  'pubmedqa.acc < -2'  scores are TASK.METRIC (acc, macro_f1, rouge1, rouge2,
                       rougeL, ...), in percent: here a loss of 2 points
  'decode.ms > 40'     a number without a sign is the figure itself
  names: ppl (needs --data), parameters, flops (per token), bytes, memory (peak
  MiB), prefill.ms, decode.ms (of a token), and TASK.METRIC

Without --baseline the first of several MODELs is what the table of changes
compares with. Gates on changes need --baseline; gates hold for every MODEL but
the baseline.

Exit status: 0, 1 where a gate failed (one line each on standard error), 2 on
bad input.
"""


@dataclass(frozen=True)
class _Outcome:
    """Models, what each but `baseline` `changed` from it, the gates' verdicts, and how many rows perplexity is of."""

    models: Sequence[Measured]
    baseline: str
    changed: dict[str, dict[str, Difference]]
    verdicts: Sequence[Verdict]
    rows: int


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", metavar="MODEL", nargs="+", help="hub name, folder, or .gguf file")
    data = parser.add_argument_group("perplexity")
    data.add_argument("--data", metavar="FILE", action="append", default=[], help="JSONL file or hub data set")
    data.add_argument("--split", default="test", help="split of a hub data set (default test)")
    data.add_argument("--prompt", help="template over the columns, e.g. 'Question: {question}'")
    data.add_argument("--completion", help="template over the columns, e.g. ' {answer}'")
    data.add_argument("--completion-only", action="store_true", help="count the tokens of completions only")
    data.add_argument("--packing", action="store_true", help="windows of exactly --max-length tokens")
    data.add_argument("--max-length", type=int, default=256, help="tokens a row or window (default 256)")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", metavar="TASK", action="append", default=[], help="see below; needs atp[tasks]")
    tasks.add_argument("--task-rows", type=int, metavar="N", help="score N rows of each task, evenly spread")
    tasks.add_argument("--include-path", metavar="FOLDER", help="folder of lm-eval task definitions (YAML)")
    gates = parser.add_argument_group("regressions")
    gates.add_argument("--baseline", metavar="MODEL", help="what changes are from; measured too if it is no MODEL")
    gates.add_argument("--fail-if", metavar="EXPR", action="append", default=[], help="see below")
    parser.add_argument("--no-speed", action="store_true", help="leave latencies out")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at once (default 8)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--gguf-file", help="GGUF file inside every MODEL that is not itself a .gguf path")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure the models one after the other, print tables, and say which gates failed."""
    for name, least in (("max_length", 2), ("batch_size", 1), ("task_rows", 1)):
        given = getattr(arguments, name)
        if given is not None and given < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be an integer >= {least}")
    gates = [parse_gate(text) for text in arguments.fail_if]
    names = list(arguments.models)
    if arguments.baseline is not None and arguments.baseline not in names:
        names.insert(0, arguments.baseline)
    if arguments.baseline is not None and len(names) == 1:
        raise ConfigError(f"--baseline {arguments.baseline} is the only MODEL: give one to compare with it")
    tasks = find_tasks(arguments.tasks, arguments.task_rows, arguments.include_path)
    check_gates(gates, bool(arguments.data), not arguments.no_speed, tasks.metrics, arguments.baseline)
    rows = _rows(arguments)
    texts = [_Text.of(name, rows, arguments) for name in names]
    first = names.index(arguments.baseline) if arguments.baseline is not None else 0
    others = [index for index in range(len(names)) if index != first]
    if others and (tasks.metrics or any(texts[index].is_as(texts[first]) for index in others)):
        scipy()  # not found missing once all is measured
    models = [_measure(text, tasks, arguments) for text in texts]
    against = [models[index] for index in others]
    changed = {model.name: differences(models[first], model) for model in against}
    judged = against if arguments.baseline is not None and against else models
    verdicts = [judge(gate, model.name, figures(model), changed.get(model.name)) for gate in gates for model in judged]
    found = _Outcome(models, models[first].name, changed, verdicts, len(rows))
    _print(found, arguments.data)
    if arguments.json:
        write_json(arguments.json, _results(found, arguments.data))
    failed = [verdict for verdict in verdicts if verdict.failed]
    for verdict in failed:
        print(f"atp: {line(verdict)}", file=sys.stderr)
    return 1 if failed else 0


def _rows(arguments: argparse.Namespace) -> list[Row]:
    if arguments.prompt is not None and arguments.completion is None:
        raise ConfigError("--prompt is a template but --completion is missing: give both")
    if not arguments.data:
        return []
    return read_rows(arguments.data, arguments.split, arguments.prompt, arguments.completion)


@dataclass(frozen=True)
class _Text:
    """The rows to measure a model on, as it reads them; `digest` tells windows apart."""

    model: str
    gguf_file: str | None
    tokenizer: PreTrainedTokenizerBase
    windows: Dataset | None
    digest: str | None

    @classmethod
    def of(cls, model: str, rows: Sequence[Row], arguments: argparse.Namespace) -> "_Text":
        gguf_file = None if model.endswith(".gguf") else arguments.gguf_file
        tokenizer = load_tokenizer(model, gguf_file)
        if not rows:
            return cls(model, gguf_file, tokenizer, None, None)
        windows = make_windows(rows, tokenizer, arguments.max_length, arguments.packing, arguments.completion_only)
        return cls(model, gguf_file, tokenizer, windows, windows_fingerprint(windows))

    def is_as(self, other: "_Text") -> bool:
        """Whether both models read the very same windows."""
        return self.digest is not None and self.digest == other.digest


def _measure(text: _Text, tasks: Tasks, arguments: argparse.Namespace) -> Measured:
    release_memory()
    measurable = reset_peak_memory()
    model = to_best_device(load_model(text.model, text.gguf_file, arguments.dtype))
    result: dict[str, Any] = {"model": text.model, **model_cost(model, not arguments.no_speed)}
    result |= {"bytes": bytes_of(text.model, text.gguf_file), "dtype": str(model.dtype).removeprefix("torch.")}
    by_row = None
    if text.windows is not None:
        found, by_row = perplexity_by_row(model, text.windows, arguments.batch_size)
        result |= dataclasses.asdict(found)
    scores = tasks.scores(model, text.tokenizer, arguments.batch_size, arguments.task_rows)
    result["peak_memory_mib"] = peak_memory_mib() if measurable else None
    result["tasks"] = {task: dataclasses.asdict(score) for task, score in scores.items()}
    del model
    release_memory()
    return Measured(text.model, result, scores, by_row, text.digest)


def _print(found: _Outcome, data: Sequence[str]) -> None:
    print_costs(found.models)
    if found.rows:
        print_perplexity(f"{', '.join(data)}: {found.rows} rows", found.models)
    if found.models[0].scores:
        print_scores(found.models)
    if found.changed:
        print_differences(found.baseline, found.changed)
    if found.verdicts:
        print_verdicts(found.verdicts)


def _results(found: _Outcome, data: Sequence[str]) -> dict[str, Any]:
    return {
        "models": [model.result for model in found.models],
        "data": data,
        "rows": found.rows,
        "baseline": found.baseline if found.changed else None,
        "differences": {
            name: {figure: dataclasses.asdict(difference) for figure, difference in figures_changed.items()}
            for name, figures_changed in found.changed.items()
        },
        "gates": [dataclasses.asdict(verdict) for verdict in found.verdicts],
        "failed": [verdict.gate for verdict in found.verdicts if verdict.failed],
        "versions": versions_of("atp", "torch", "transformers", "lm_eval"),
    }
