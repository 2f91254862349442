"""rankwise data: what would be read of a user's own files."""

import json
from typing import Annotated

import typer
from rankwise.experiments.cli.options import Json
from rankwise.experiments.cli.own_options import own_entry

SHOWN = 3  # rows of the training part
WIDEST = 300  # characters of a field that are shown
MOST = 20  # classes whose images are counted


def data(
    train: Annotated[str, typer.Argument(help="File (JSONL, JSON, CSV, TSV, Parquet), glob, folder of images, or hub id.")],
    test: Annotated[str | None, typer.Option(help="The part that is reported.  [default: a fixed tenth]")] = None,
    validation: Annotated[str | None, typer.Option(help="The part that rates are chosen on.  [default: a fixed tenth]")] = None,
    kind: Annotated[str | None, typer.Option(help="Kind of task.  [default: by the fields]")] = None,
    input: Annotated[str | None, typer.Option(help="Field or template that the model reads.")] = None,
    target: Annotated[str | None, typer.Option(help="Field or template that it is to give.")] = None,
    as_json: Json = False,
) -> None:
    """Show how a file of your own is read: fields, parts, labels, first rows, and what is wrong with it."""
    from rankwise.experiments.tasks import own, own_images

    parts = own.read(own_entry(train, test, validation, kind, input, target))
    rows = [{k: v for k, v in vars(row).items() if v not in (None, ())} for row in parts.rows["train"][:SHOWN]]
    sizes = {part: len(found) for part, found in parts.rows.items()}
    counts, pictures = own_images.counts(parts.labels, parts.rows), None
    if parts.reading.kind == "image-classification":
        pictures = own_images.sizes([row.input for found in parts.rows.values() for row in found])
    if as_json:
        facts = {"kind": parts.reading.kind, "fields": parts.fields, "rows": sizes, "labels": parts.labels}
        facts |= {} if pictures is None else {"counts": counts, "sizes": pictures}
        print(json.dumps(facts | {"notes": parts.notes, "first": rows}, indent=1, default=str))
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
            text = str(value)
            print(f"  {key}: {text[:WIDEST]}{' ...' if len(text) > WIDEST else ''}")
