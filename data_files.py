"""How are files of examples read? JSONL, parquet, folders of them, and data sets of the hub; and rows of one's own.

A row of one's own has a question, an answer and perhaps pictures: `image`, one, or `images`, a list. In a JSONL file a
picture is a path, relative to the folder of the file and inside it; in parquet and on the hub it is the picture itself.
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PICTURE_COLUMNS = ("image", "images")  # looked for where --dataset_options image=NAME is not given


def jsonl_rows(path: Path) -> list[tuple[int, object]]:
    """(line, value) of each line of a JSONL file in UTF-8, UTF-16 or UTF-32, with or without byte order marks, blank
    lines and any line ends.

    Raises:
        ValueError: no Unicode text, no rows, or a line that is not JSON, which the message numbers.
    """

    def parse(line: str, number: int) -> object:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error

    raw = path.read_bytes()
    try:
        text = raw.decode(json.detect_encoding(raw))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8") from error
    # str.splitlines() would also split inside of texts; files that were joined have byte order marks between lines
    lines = [line.strip("\ufeff \t") for line in re.split(r"\r\n|\r|\n", text)]
    rows = [(number, parse(line, number)) for number, line in enumerate(lines, 1) if line]
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def parquet_rows(path: Path) -> list[tuple[int, object]]:
    """(number, row as a dict) of each row. Raises ValueError: the file cannot be read."""
    import pyarrow.parquet

    try:
        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is not a readable parquet file") from error


def hub_table(name: str, subset: str, split: str) -> Any:
    """A split of a data set of the hub, or of its copy in this machine's cache, as `datasets` gives it.

    Raises:
        ConnectionError: neither gives it; the message is the reason, in one line.
    """
    trouble = ""
    try:
        import datasets  # takes seconds to import, and only this function needs it

        if not datasets.config.HF_HUB_OFFLINE:
            trouble = hub_trouble(name)
            datasets.config.HF_HUB_OFFLINE = bool(trouble)  # then only the cache is read
        return datasets.load_dataset(*filter(None, (name, subset)), split=split)
    except Exception as error:  # of datasets, huggingface_hub, httpx, pyarrow or json
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConnectionError(trouble or reason) from error


def hub_trouble(name: str, seconds: float = 5.0) -> str:
    """Why the hub cannot give a data set, or "". One quick request; `datasets` would wait minutes for a silent hub."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    try:
        url = f"{constants.ENDPOINT}/api/datasets/{name}"
        response = get_session().get(url, headers=build_hf_headers(), timeout=seconds)
    except Exception as error:  # the HTTP library has its own exception types
        return f"{constants.ENDPOINT} does not answer: {type(error).__name__}"
    if response.status_code != 200:
        return f"{constants.ENDPOINT} answers with the status {response.status_code}"
    try:
        response.json()
    except ValueError:
        return f"{constants.ENDPOINT} answers with a page that is not the hub's, perhaps a login page"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Rows of one's own


@dataclass(frozen=True)
class Row:
    """A question, its answer as it was written, and how to open its pictures; `place` names file and line."""

    place: str
    question: str
    answer: str
    pictures: tuple[Callable[[], Image.Image], ...]


@dataclass(frozen=True)
class Columns:
    """The names of the columns; without `image`, those of PICTURE_COLUMNS that are there."""

    question: str = "question"
    answer: str = "answer"
    image: str = ""


def own_rows(path: str, split: str, columns: Columns, test: str = "", subset: str = "") -> list[Row]:
    """The rows of a split.

    Args:
        path: a JSONL or parquet file; a folder with train.jsonl and test.jsonl, or with parquet files as on the hub;
            or, where there is no such file, the name of a data set on the hub.
        test: a file with the test split. Without it, a single file's last tenth is the test split.
        subset: the configuration of a data set of the hub.

    Raises:
        OSError: no such file, or the hub does not give the data set.
        ValueError: a malformed row; the message names the file and the line.
    """
    local = Path(path)
    if test and split == "test":
        return file_rows(Path(test), columns)
    if local.is_file():
        rows, held_out = file_rows(local, columns), 0
        if not test:
            held_out = max(1, len(rows) // 10)
            if len(rows) < 2:
                raise ValueError(f"{path} has one row; at least two are needed, since the last tenth is the test split")
        return rows[len(rows) - held_out :] if split == "test" else rows[: len(rows) - held_out]
    if local.is_dir():
        if (local / f"{split}.jsonl").is_file():
            return file_rows(local / f"{split}.jsonl", columns)
        tables = sorted([*local.glob(f"{split}*.parquet"), *local.glob(f"*/{split}*.parquet")])
        if not tables:
            raise FileNotFoundError(f"the dataset folder {path} has neither {split}.jsonl nor {split}*.parquet")
        return [row for table in tables for row in file_rows(table, columns)]
    if not HUB_NAME.fullmatch(path) or local.suffix in (".jsonl", ".parquet", ".json"):
        raise FileNotFoundError(f"there is no dataset file or folder {path}")
    try:
        table = hub_table(path, subset, split)
    except ConnectionError as error:
        raise ConnectionError(f"the {split} split of {path} could not be loaded from the hub: {error}") from error
    return hub_rows(table, f"{path} ({split})", columns)


def file_rows(path: Path, columns: Columns) -> list[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no dataset file {path}")
    parquet = path.suffix == ".parquet"
    rows, word = (parquet_rows(path), "row") if parquet else (jsonl_rows(path), "line")
    return [own_row(raw, f"{path}, {word} {number}", columns, path.parent) for number, raw in rows]


def hub_rows(table: Any, place: str, columns: Columns) -> list[Row]:
    """Texts are read now; a picture is decoded when it is opened."""
    names = [name for name in ((columns.image,) if columns.image else PICTURE_COLUMNS) if name in table.column_names]
    wanted = {columns.question, columns.answer, columns.image} - {""}
    if missing := sorted(wanted - set(table.column_names)):
        raise ValueError(
            f"{place} has no column {missing[0]!r}, only {', '.join(table.column_names)}: name them with "
            "--dataset_options question=… answer=… image=…"
        )
    texts = table.select_columns([columns.question, columns.answer])
    rows = []
    for index in range(len(texts)):
        row = own_row(texts[index], f"{place}, row {index + 1}", columns, None)
        values = as_list(table[index][names[0]]) if names else []
        pictures = tuple(functools.partial(hub_picture, table, names[0], index, at) for at in range(len(values)))
        rows.append(Row(row.place, row.question, row.answer, pictures))
    return rows


def hub_picture(table: Any, column: str, index: int, at: int) -> Image.Image:
    return as_list(table[index][column])[at]


def as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def own_row(raw: object, place: str, columns: Columns, folder: Path | None) -> Row:
    """Check a row and find its pictures. `folder` is that of the file; None: pictures come from elsewhere.

    Raises:
        ValueError: a column is missing or has another type, or a picture cannot be used; the message begins with
            `place`.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{place}: expected an object with {columns.question!r} and {columns.answer!r}")
    texts = []
    for name in (columns.question, columns.answer):
        value = raw.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # "answer": 72
        if not isinstance(value, str) or not value.strip():
            have = ", ".join(map(str, raw)) or "nothing"
            raise ValueError(f"{place}: {name!r} is not a text or empty; the row has {have}")
        if re.search("[\ud800-\udfff]", value):
            raise ValueError(f"{place}: {name!r} has half of a surrogate pair, which is no character")
        texts.append(value)
    names = (columns.image,) if columns.image else PICTURE_COLUMNS
    values: Iterable[object] = [value for name in names for value in as_list(raw.get(name))] if folder else []
    pictures = tuple(functools.partial(open_picture, checked_picture(value, place, folder)) for value in values)
    question, answer = texts
    return Row(place, question, answer, pictures)


def checked_picture(value: object, place: str, folder: Path | None) -> Path | bytes:
    """The file or the bytes of a picture. Only its header is read, so that many are checked soon."""
    source: Path | bytes
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):  # how parquet files of the hub keep it
        source, shown = value["bytes"], "the picture"
    elif isinstance(value, str) and folder is not None:
        source, shown = (folder / value).resolve(), f"the picture {value}"
        if not source.is_relative_to(folder.resolve()):
            raise ValueError(f"{place}: {shown} is outside of the folder of its file: put it inside")
        if not source.is_file():
            raise ValueError(f"{place}: there is no file {value} beside it")
    else:
        raise ValueError(f"{place}: a picture is the path of a file, as text, not {type(value).__name__}")
    try:
        open_picture(source).close()
    except Exception as error:  # Pillow's readers raise many types
        raise ValueError(f"{place}: {shown} cannot be read ({type(error).__name__})") from error
    return source


def open_picture(source: Path | bytes) -> Image.Image:
    """Opened by Pillow; pixels are read later."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
