"""The finished runs of a study in one file that git can hold: DIR/runs.parquet, one row a run, sorted by fingerprint.

Each file of a run (experiments/records.py) is a column that holds it byte for byte, so that what is read back is the run,
and `compare` takes it as finished.  The columns before them repeat what one wants to see first:

    duckdb -c "from 'runs.parquet' select setting, task, avg(score) where phase = 'final' group by all"
    pandas.read_parquet("runs.parquet")[["setting", "seed", "learning_rate", "score"]]
    safetensors.numpy.load(pandas.read_parquet("runs.parquet")["predictions.safetensors"][0])["predictions"]

Parquet rather than compressed JSON lines: it opens in every tool as it is, the results are read without the histories, and
with one column a file the compressor sees each kind of text together: 258 runs of 15 MB take 0.3 MB (zstd, level 19, one
page a column; JSON lines have the five kinds in turns).  Equal runs give equal bytes with the same version of pyarrow.
Parquet checks its pages and not its footer, which says where they lie, so the schema holds a digest of the runs as well.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankwise.experiments.files import write_file
from rankwise.experiments.records import CONFIG, FILES, PREDICTIONS, RESULT, SAMPLES

NAME = "runs.parquet"
FACTS = ("fingerprint", "setting", "method", "task", "phase", "seed", "learning_rate", "status", "selection_score", "score")
LEVEL = 19  # of zstd, with a window of 8 MB: half of what level 3 leaves, in seconds
MOST_BYTES = 4 << 30  # of an archive that is read, unpacked: 70,000 runs of 60 kB
ONE_PAGE = 1 << 30  # bytes: a column is compressed as a whole
ADDED = (SAMPLES,)  # files that runs did not always have: no column where no run has one, so that equal runs give equal bytes
DIGEST = b"rankwise.sha256"  # of the runs, in the schema's metadata; older archives have none

Files = Mapping[str, bytes]  # the files of one run by name


def write(path: Path, runs: Iterable[Files]) -> None:
    """Writes the archive whole or not at all; what stood there before is replaced.

    Raises:
        ValueError: two runs with one fingerprint, or a file that is not UTF-8.
    """
    import pyarrow as pa  # 0.2 seconds, which reports of plain folders do not need
    import pyarrow.parquet as pq

    rows = {}
    for files in runs:
        result = json.loads(files[RESULT])
        if result["fingerprint"] in rows:
            raise ValueError(f"{path}: two runs have the fingerprint {result['fingerprint']}")
        rows[result["fingerprint"]] = result, files
    rows = dict(sorted(rows.items()))
    ordered = list(rows.values())
    types = {"seed": pa.int64(), "learning_rate": pa.float64(), "selection_score": pa.float64(), "score": pa.float64()}
    columns = {name: pa.array([result.get(name) for result, _ in ordered], types.get(name, pa.string())) for name in FACTS}
    for name in FILES:
        if name in ADDED and not any(name in files for _, files in ordered):
            continue
        kind = pa.binary() if name == PREDICTIONS else pa.string()
        columns[name] = pa.array([_text(path, name, files.get(name)) for _, files in ordered], kind)
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(columns, metadata={DIGEST: _digest({fingerprint: files for fingerprint, (_, files) in rows.items()})}),
        sink,
        row_group_size=max(len(ordered), 1),
        compression="zstd",
        compression_level=LEVEL,
        use_dictionary=False,
        write_statistics=False,
        data_page_size=ONE_PAGE,
        write_page_checksum=True,
    )
    write_file(path, sink.getvalue().to_pybytes())


def read(path: Path) -> dict[str, dict[str, bytes]]:
    """Fingerprint -> the files of that run; none where there is no archive.

    Raises:
        ValueError: cut off, changed, or not an archive of runs.
    """
    if not path.is_file():
        return {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "take it from git again, or write it anew with `rankwise report RUNS --with-runs --out STUDY`"
    try:
        _check_size(path, pq.read_metadata(path), remedy)
        table = pq.read_table(path, page_checksum_verification=True)
        names = set(table.column_names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a whole Parquet file ({str(error).splitlines()[0]}); {remedy}") from None
    if missing := {"fingerprint", CONFIG, RESULT} - names:
        raise ValueError(f"{path} is no archive of runs: it has no column {', '.join(sorted(missing))}; {remedy}")
    try:
        columns = {name: table[name].to_pylist() for name in FILES if name in names}
        runs = {
            fingerprint: {name: _bytes(column[row]) for name, column in columns.items() if column[row] is not None}
            for row, fingerprint in enumerate(table["fingerprint"].to_pylist())
        }
        digest = (table.schema.metadata or {}).get(DIGEST)
        whole = digest is None or digest == _digest(runs)
    except (pa.ArrowException, UnicodeDecodeError, AttributeError):  # text or numbers where the other belongs
        whole = False
    if not whole:
        raise ValueError(f"{path} was changed after it was written: its runs are not those of its digest; {remedy}")
    return runs


def _check_size(path: Path, metadata: Any, remedy: str) -> None:
    """Whether the runs fit into memory as the footer has them: what is highly compressed can be of any size.

    Raises:
        ValueError: they are larger than any study's.
    """
    # Of groups, not of columns: those of a damaged footer end the process.
    size = sum(max(metadata.row_group(i).total_byte_size, 0) for i in range(metadata.num_row_groups))
    if size > MOST_BYTES:
        raise ValueError(
            f"{path} holds {size:,} bytes when it is unpacked, more than the {MOST_BYTES:,} that are read; {remedy}"
        )


def _digest(runs: Mapping[str, Files]) -> bytes:
    """Of every byte of every file of the runs, in their order, with its name and length."""
    digest = hashlib.sha256()
    for fingerprint, files in runs.items():
        for name in FILES:
            if (content := files.get(name)) is not None:
                digest.update(f"{fingerprint}/{name} {len(content)}\n".encode())
                digest.update(content)
    return digest.hexdigest().encode()


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8")


def _text(path: Path, name: str, content: bytes | None) -> str | bytes | None:
    if content is None or name == PREDICTIONS:
        return content
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {name} of a run is not UTF-8 ({error}): move that run's folder away") from None
