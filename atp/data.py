"""Rows -> token windows: JSONL files or hub data sets, tokenised with labels, packed or cut to length.

A row has `prompt` and `completion` (which starts with the space that joins it to the prompt), or `text`, or any columns
that the `prompt` and `completion` templates name; rows of a task may have `choices` and `label` besides. Packing
concatenates rows, each closed by the end-of-text token, and cuts windows of exactly `max_length`; attention is not
blocked between the rows of a window.

Not covered: chat templates, streaming, images.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from atp.errors import DataError

IGNORED = -100
"""The label of a token that is not learned."""

_CHUNK_ROWS = 512
_FILE_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Row:
    """One training example in words."""

    prompt: str
    completion: str

    @property
    def blank(self) -> bool:
        """Whether there is nothing but white space."""
        return not f"{self.prompt}{self.completion}".strip()

    @property
    def fingerprint(self) -> str:
        """A hash of the content, blind to case and white space."""
        text = " ".join(f"{self.prompt}{self.completion}".lower().split())
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class TaskRow(Row):
    """A row that a model is scored on, and not only measured: `choices`, of which number `label` is the completion.

    A row without choices is answered in the model's own words; one without a prompt is text to be read.
    """

    choices: tuple[str, ...] = ()
    label: int | None = None

    @property
    def kind(self) -> str:
        """`choice`, `generation` or `text`."""
        return "choice" if self.choices else "generation" if self.prompt else "text"


def read_rows(
    sources: str | Sequence[str], split: str = "train", prompt: str | None = None, completion: str | None = None
) -> list[Row]:
    """Read JSONL files and hub data sets (`name` or `name:config`), one after the other.

    Args:
        sources: a path ending in .jsonl, .json or .ndjson (one JSON object a line), or a hub name; or several.
        split: the split taken of a hub data set; slices such as `train[:900]` work.
        prompt, completion: `str.format` templates over a row's columns, none of them null, e.g.
            `"Question: {question}\\nAnswer:"`; without them a row must have `prompt` and `completion`, or `text`.

    Raises:
        DataError: naming the file, and the line where there is one.
    """
    rows: list[Row] = []
    for source in [sources] if isinstance(sources, str) else sources:
        records = _read_file(Path(source)) if source.endswith(_FILE_SUFFIXES) else _read_hub(source, split)
        found = [_row(record, where, prompt, completion) for where, record in records]
        if not found:
            raise DataError(f"{source}: holds no rows: give a file or split with at least one")
        rows += found
    return rows


def read_task(path: str) -> list[TaskRow]:
    """Read a JSONL file of one kind of rows: `prompt` and `completion`, those with `choices` and `label`, or `text`.

    Raises:
        DataError: naming the file and the line.
    """
    rows = [_task_row(record, where) for where, record in _read_file(Path(path))]
    if not rows:
        raise DataError(f"{path}: holds no rows: give a file with at least one")
    kinds = {row.kind for row in rows}
    if len(kinds) > 1:
        column = "`choices`" if "choice" in kinds else "a `prompt`"
        raise DataError(f"{path}: some rows have {column} and some have none: make them two files")
    return rows


def fingerprint(rows: Iterable[Row]) -> str:
    """A hash of the rows' content, in their order: equal where a model saw, or was scored on, the very same rows."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(dataclasses.astuple(row)).encode() + b"\n")
    return found.hexdigest()


def windows_fingerprint(windows: Dataset) -> str:
    """A hash of tokens and labels, in their order: equal where a model was measured on the very same windows."""
    found = hashlib.sha256()
    for window in windows:
        found.update(json.dumps([window["input_ids"], window["labels"]]).encode() + b"\n")
    return found.hexdigest()


def check_disjoint(rows: Iterable[Row], held_out: Iterable[Row], names: tuple[str, str]) -> None:
    """Raise `DataError` if the two share a row that has text; `names` are what the message calls them."""
    one, other = ({row.fingerprint for row in each if not row.blank} for each in (rows, held_out))
    shared = one & other
    if shared:
        raise DataError(
            f"{len(shared)} row(s) are in both the {names[0]} and the {names[1]} set: results would be too good; "
            f"remove them from one"
        )


def make_windows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    packing: bool = True,
    completion_only: bool = False,
    progress: bool = True,
) -> Dataset:
    """Tokenise the `rows` that have text into a data set of `input_ids` and `labels`.

    Args:
        max_length: packed windows have exactly this many tokens, the last incomplete one is dropped, and each begins
            with BOS where the tokenizer begins texts with it; without packing a row is cut to this many: first the
            start of the prompt, then the end of the completion.
        completion_only: prompt tokens get the label -100.

    Raises:
        DataError: where nothing is left.
    """
    examples = _tokenise([row for row in rows if not row.blank], tokenizer, completion_only, progress)
    bos = tokenizer.bos_token_id
    windows = list(_pack(examples, max_length, bos) if packing else _cut(examples, tokenizer, max_length))
    if not windows:
        raise DataError(
            f"{len(rows)} row(s) do not fill one window of {max_length} tokens: give more text or lower max_length"
        )
    return Dataset.from_dict({"input_ids": [w.ids for w in windows], "labels": [w.labels for w in windows]})


def learned_tokens(batch: Mapping[str, Any]) -> int:
    """How many labels of a batch, `(rows, tokens)`, a causal model's loss is the mean over."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def causal(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a causal model's own loss is of, in a collated batch: all of it, or of preference pairs what is preferred.

    Args:
        batch: of pairs, as TRL's `DPOTrainer` has them with `precompute_ref_log_probs`: `input_ids`, `attention_mask`
            and `completion_mask`, `(2 * rows, tokens)`, preferred rows first. Their labels are completions.
    """
    if "ref_chosen_logps" not in batch:
        return batch
    rows = len(batch["ref_chosen_logps"])
    ids, mask, learned = (batch[k][:rows] for k in ("input_ids", "attention_mask", "completion_mask"))
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(learned == 0, IGNORED)}


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads `input_ids`, `attention_mask` and `labels` of a batch to its longest window."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


@dataclass(frozen=True)
class _Example:
    """Token ids, their labels, and how many of them are prompt."""

    ids: list[int]
    labels: list[int]
    prompt_length: int


def _read_file(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as lines:  # Windows writes a mark at the start
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _record(line, f"{path}, line {number}")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: check the path (it is relative to where the command runs)") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: cannot be read: it is not UTF-8: save it as UTF-8, one JSON object a line") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _record(line: str, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError):
        raise DataError(
            f"{where}: cannot be read: nested too deeply, or a number of thousands of digits: leave the row out"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be a JSON object, found {type(record).__name__}")
    return record


def _read_hub(source: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name, _, config = source.partition(":")
    if Path(name).exists():
        raise DataError(f"{source}: data files must end in {', '.join(_FILE_SUFFIXES)}: rename or convert it")
    try:
        records = load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types, all of them bad input or no network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{source}: neither a {'/'.join(_FILE_SUFFIXES)} file nor a hub data set with split {split!r} that can "
            f"be read: {reason}"
        ) from None
    for number, record in enumerate(records):
        yield f"{source}[{split}], row {number}", record


def _row(record: Mapping[str, Any], where: str, prompt: str | None, completion: str | None) -> Row:
    if completion is None:
        pair = _pair(record, where)
    else:
        pair = _fill(prompt or "", record, where), _fill(completion, record, where)
    for text in pair:
        _check_text(text, where)
    return Row(*pair)


def _pair(record: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Prompt and completion of a row that has them, or text."""
    if {"prompt", "completion"} <= record.keys():
        pair = record["prompt"], record["completion"]
    elif "text" in record:
        pair = "", record["text"]
    else:
        raise DataError(
            f"{where}: needs columns `prompt` and `completion`, or `text`; found {', '.join(record) or 'none'}: "
            "rename them, or set templates `prompt` and `completion` where there are such settings"
        )
    if not all(isinstance(part, str) for part in pair):
        raise DataError(f"{where}: `prompt`, `completion` and `text` must be strings")
    return pair


def _check_text(text: str, where: str) -> None:
    """JSON can name half of a character, as `\\ud83d`: no file can hold it, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        excerpt = text[max(0, error.start - 20) : error.start + 1]
        raise DataError(
            f"{where}: {excerpt!r} ends in half of a character (a lone surrogate): mend the text or leave the row out"
        ) from None


def _task_row(record: Mapping[str, Any], where: str) -> TaskRow:
    row = _row(record, where, None, None)
    choices, label = record.get("choices"), record.get("label")
    chooses = choices is not None or label is not None
    if not row.completion.strip() or (chooses and not row.prompt):
        raise DataError(
            f"{where}: a task needs a `prompt` and a `completion`, or `text`, and what is there is empty: fill it in"
        )
    if not chooses:
        return TaskRow(row.prompt, row.completion)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise DataError(f"{where}: `choices` must be a list of two strings or more, found {choices!r}")
    if type(label) is not int or not 0 <= label < len(choices):
        raise DataError(f"{where}: `label` must be a number from 0 to {len(choices) - 1}, found {label!r}")
    for choice in choices:
        _check_text(choice, where)
    if row.completion != choices[label]:
        raise DataError(
            f"{where}: choices[{label}] is {choices[label]!r}, the completion {row.completion!r}: make them equal"
        )
    return TaskRow(row.prompt, row.completion, tuple(choices), label)


def _fill(template: str, record: Mapping[str, Any], where: str) -> str:
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name]
        nulls = [name for name in names if Formatter().get_field(name, (), record)[0] is None]
        filled = "" if nulls else template.format(**record)
    except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
        raise DataError(
            f"{where}: template {template!r} does not fit: {error!r}; columns: {', '.join(record)}"
        ) from None
    if nulls:
        raise DataError(
            f"{where}: `{nulls[0]}` is null, and template {template!r} takes it: fill it in or leave the row out"
        )
    return filled


def _tokenise(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, completion_only: bool, progress: bool
) -> Iterator[_Example]:
    with tqdm(total=len(rows), desc="tokenising", unit="row", disable=not progress, leave=False, delay=1) as bar:
        for start in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows[start : start + _CHUNK_ROWS]
            prompts = tokenizer([row.prompt for row in chunk], verbose=False)["input_ids"]
            wholes = tokenizer([row.prompt + row.completion for row in chunk], verbose=False)["input_ids"]
            for prompt, whole in zip(prompts, wholes, strict=True):
                yield _example(prompt, whole, tokenizer.eos_token_id, completion_only)
            bar.update(len(chunk))


def _example(prompt: list[int], whole: list[int], eos: int | None, completion_only: bool) -> _Example:
    """The prompt part is the longest common start, so a token that spans the border counts as completion."""
    length = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    ids = whole if eos is None or whole[-1:] == [eos] else [*whole, eos]
    labels = [IGNORED] * length + ids[length:] if completion_only else list(ids)
    return _Example(ids, labels, length)


def _pack(examples: Iterable[_Example], max_length: int, bos: int | None) -> Iterator[_Example]:
    """Windows cut from the stream of examples.

    A tokenizer that begins texts with BOS begins every window with one, also in the middle of a text: without it
    Gemma 3 270M's perplexity on medical text is three times as high. Nobody predicts a BOS, so it has no label.
    """
    ids: list[int] = []
    labels: list[int] = []
    for example in examples:
        begins = [bos] if bos is not None and example.ids[:1] == [bos] else []
        ids += example.ids
        labels += [IGNORED] * len(begins) + example.labels[len(begins) :]
        start = 0
        head: list[int] = []
        while len(ids) - start >= max_length - len(head):
            end = start + max_length - len(head)
            yield _Example(head + ids[start:end], [IGNORED] * len(head) + labels[start:end], 0)
            start, head = end, begins if ids[end : end + 1] not in ([], begins) else []
        ids[:start] = head
        labels[:start] = [IGNORED] * len(head)


def _cut(examples: Iterable[_Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[_Example]:
    for example in examples:
        first = 1 if example.ids[:1] == [tokenizer.bos_token_id] else 0
        drop = max(0, min(len(example.ids) - max_length, example.prompt_length - first))
        ids = (example.ids[:first] + example.ids[first + drop :])[:max_length]
        labels = (example.labels[:first] + example.labels[first + drop :])[:max_length]
        if any(label != IGNORED for label in labels[1:]):
            yield _Example(ids, labels, example.prompt_length - drop)
