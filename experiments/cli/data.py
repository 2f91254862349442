"""rankwise data: what would be read of a user's own files."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rankwise.experiments.cli.options import Json, check_least
from rankwise.experiments.cli.own_options import own_entry

if TYPE_CHECKING:
    from rankwise.experiments.data_entries import OwnData
    from rankwise.experiments.own_view import View

SHOWN = 3  # rows of the training part
WIDEST = 300  # characters of a field that are shown
WIDEST_TOKENS = 2_000  # characters of a row's tokens that are shown
MOST = 20  # classes whose images are counted


def data(
    train: Annotated[str, typer.Argument(help="File (JSONL, JSON, CSV, TSV, Parquet), glob, folder of images, or hub id.")],
    test: Annotated[str | None, typer.Option(help="The part that is reported.  [default: a fixed tenth]")] = None,
    validation: Annotated[str | None, typer.Option(help="The part that rates are chosen on.  [default: a fixed tenth]")] = None,
    kind: Annotated[str | None, typer.Option(help="Kind of task.  [default: by the fields]")] = None,
    input: Annotated[str | None, typer.Option(help="Field or template that the model reads.")] = None,
    target: Annotated[str | None, typer.Option(help="Field or template that it is to give.")] = None,
    model: Annotated[str | None, typer.Option(help="Show rows as this model sees them: a hub id or a folder.")] = None,
    max_length: Annotated[int | None, typer.Option(help="With --model: tokens of a row.  [default: as compare would]")] = None,
    as_json: Json = False,
) -> None:
    """Show how a file of your own is read: fields, parts, labels, first rows, and what is wrong with it.

    With --model: also the tokens of the first rows, which of them are scored, and how many rows are too long; of images the
    size that the model reads.
    """
    from rankwise.experiments.tasks import own, own_images, own_tasks

    check_least("--max-length", max_length, 8)
    if max_length is not None and model is None:
        raise ValueError(f"--max-length {max_length} has no effect without --model: name the model too, or take it out")
    entry = own_entry(train, test, validation, kind, input, target)
    parts = own.read(entry)
    own_tasks.check_rows(parts, entry)
    rows = [{k: v for k, v in vars(row).items() if v not in (None, ())} for row in parts.rows["train"][:SHOWN]]
    sizes = {part: len(found) for part, found in parts.rows.items()}
    counts, pictures = {}, None
    if parts.reading.kind == "image-classification":
        counts = own_images.counts(parts.labels, parts.rows)
        pictures = own_images.sizes([row.input for found in parts.rows.values() for row in found])
    seen = None if model is None else _seen(entry, model, max_length)
    if as_json:
        facts: dict[str, Any] = {"kind": parts.reading.kind, "fields": parts.fields, "rows": sizes, "labels": parts.labels}
        facts |= {} if pictures is None else {"counts": counts, "sizes": pictures}
        facts |= {"notes": parts.notes, "first": rows}
        if seen is not None:
            from rankwise.experiments import own_view

            facts |= own_view.as_json(seen)
        print(json.dumps(facts, indent=1, default=str))
        return
    print(f"fields: {', '.join(parts.fields)}")
    print(f"kind:   {parts.reading.kind}")
    print(f"rows:   {', '.join(f'{part} {count:,}' for part, count in sizes.items())}")
    if parts.labels:
        print(f"labels: {len(parts.labels)} ({', '.join(parts.labels[:10])}{', ...' if len(parts.labels) > 10 else ''})")
    if pictures is not None:
        print(f"sizes:  {pictures}")
        for part, of_part in counts.items():
            shown = [f"{label} {count:,}" for label, count in list(of_part.items())[:MOST]]
            print(f"{part}: {', '.join(shown)}{', ...' if len(of_part) > MOST else ''}")
    for note in parts.notes:
        print(f"- {note}")
    for number, row in enumerate(rows, start=1):
        print(f"\nrow {number} of the training part")
        for key, value in row.items():
            print(f"  {key}: {_short(_plain(value), WIDEST)}")
    if seen is not None:
        _print_seen(seen)


def _seen(entry: "OwnData", model: str, max_length: int | None) -> "View":
    from rankwise.experiments.cli.progress import Progress
    from rankwise.experiments.cli.start import start_torch
    from rankwise.experiments.tasks import in_study

    task = in_study(entry.name, [entry])
    with Progress() as bar:
        bar.say(f"{model}: loading torch and the model ...")
        start_torch(bar, None)
        from rankwise.experiments import own_view

        return own_view.view(task, model, max_length, SHOWN)


def _print_seen(seen: "View") -> None:
    from rankwise.experiments import own_view

    if seen.image_size is not None:
        height, width = seen.image_size
        print(f"\nas {seen.model} sees them: images of {width} x {height} pixels, {seen.trained_rows:,} rows to train on")
        return
    print(f"\nas {seen.model} sees them, a bar between tokens, what is scored between >> and <<")
    for number, row in enumerate(seen.rows, start=1):
        for one in row:
            name = f", {one.name}" if one.name else ""
            print(f"\nrow {number}{name}: {len(one.tokens)} tokens, {sum(one.is_scored)} scored")
            print(f"  {_short(own_view.as_line(one), WIDEST_TOKENS)}")
            if one.label:
                print(f"  scored: {one.label}")
    print("\ntokens of a row, nothing cut")
    for part, quantiles in seen.lengths.items():
        print(f"  {part}: {', '.join(f'{name} {length}' for name, length in quantiles.items())}")
    why = "" if seen.is_given else " (as compare would choose it)"
    print(f"max_length = {seen.max_length}{why}: {seen.trained_rows:,} rows to train on")
    for line in seen.cut.values():
        print(f"- {line}")
    if not seen.cut:
        print("- no row is cut")


def _plain(value: Any) -> str:
    """A value as text, the turns of a chat by their roles."""
    is_chat = isinstance(value, tuple) and all(isinstance(turn, dict) for turn in value)
    return "; ".join(f"{turn['role']}: {turn['content']}" for turn in value) if is_chat else str(value)


def _short(text: str, widest: int) -> str:
    return f"{text[:widest]}{' ...' if len(text) > widest else ''}"
