"""Neuronpedia's layout of exported features: what its own bulk exports hold, and its importer reads.

A source (an SAE) is a folder MODEL/SOURCE with one line each in model.jsonl, release.jsonl, sourceset.jsonl
and source.jsonl, and batches of rows of its tables in features/, activations/ and explanations/
(batch-0.jsonl.gz, ...). Fields are those of its schema (github.com/hijohnnylin/neuronpedia:
utils/neuronpedia-utils/neuronpedia_utils/db_models, export-data.py, apps/webapp/prisma/schema.prisma).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import shown

FOLDER = "neuronpedia"
BATCH = 1024
"""Features of a batch, as in Neuronpedia's exports."""
# The user that Neuronpedia's development database starts with, to whom its own tools give what they convert.
_CREATOR = "clkht01d40000jv08hvalcvly"
_SET_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def check_set_name(name: str | None) -> None:
    """Refuse what is no name of a source set; None is allowed.

    Raises:
        WriteSAEError: it has other characters than small letters, digits and single dashes.
    """
    if name is not None and not (isinstance(name, str) and _SET_NAME.fullmatch(name)):
        raise WriteSAEError(
            f"neuronpedia={shown(name)} is no name of a source set: small letters, digits and dashes between "
            "them, such as writesae-2k"
        )


def write_neuronpedia(export: Path, folder: Path, set_name: str) -> None:
    """Write what `export_features` exported in Neuronpedia's layout, in FOLDER/MODEL/SOURCE for each SAE.

    A source is named LAYER-SET__hHEAD (states: LAYER-SET__hHEAD-state), for a layer has several cells.
    Contexts without the feature are left out; labels become explanations.

    Args:
        export: features.jsonl.
        folder: where to write.
        set_name: of the source set, see `check_set_name`.
    """
    with export.open(encoding="utf-8") as lines:
        for _, rows in itertools.groupby(map(json.loads, lines), key=lambda row: row["hook_name"]):
            batches = _batches(rows)
            first = next(batches)
            model, source = _ids(first[0], set_name)
            place = folder / model / source
            _write_about(place, first[0], set_name)
            for number, batch in enumerate(itertools.chain([first], batches)):
                tables = {
                    "features": [_feature(row, set_name) for row in batch],
                    "activations": [x for row in batch for x in _activations(row, set_name)],
                    "explanations": [_explanation(row, set_name) for row in batch if row["label"]],
                }
                for table, content in tables.items():
                    if content:  # the importer takes the columns from the first line
                        _write(place / table / f"batch-{number}.jsonl.gz", content)


def written_in(folder: Path) -> list[Path]:
    """The files in a folder that have the names of what `write_neuronpedia` writes there."""
    single = [folder.glob(f"*/*/{name}.jsonl") for name in ("model", "release", "sourceset", "source")]
    tables = [
        folder.glob(f"*/*/{name}/batch-*.jsonl.gz") for name in ("features", "activations", "explanations")
    ]
    return [path for found in (*single, *tables) for path in found]


def remove_empty(folder: Path) -> None:
    """Remove a folder with its subfolders, as far as there are no files in them."""
    inner = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for path in [*inner, folder]:
        with contextlib.suppress(OSError):  # not empty, or not there
            path.rmdir()


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(rows, BATCH)):
        yield batch


def _ids(row: dict[str, Any], set_name: str) -> tuple[str, str]:
    """The ids of an SAE's model and source."""
    state = "-state" if row["site"] == "state" else ""
    return Path(row["model"]).name.lower(), f"{row['layer']}-{set_name}__h{row['head']}{state}"


def _write_about(place: Path, row: dict[str, Any], set_name: str) -> None:
    """The files with one line, about the model, the release, the source set and the source."""
    model, source = _ids(row, set_name)
    common = {"creatorId": _CREATOR, "createdAt": _now(), "visibility": "PUBLIC"}
    by = f"writesae-lens {row['version']}"
    files = {
        "model": {
            "id": model,
            "displayName": model,
            "displayNameShort": model,
            "instruct": False,
            "inferenceEnabled": False,
            "layers": 0,
            "neuronsPerLayer": 0,
            "owner": "",
            "updatedAt": _now(),
        },
        "release": {"name": set_name, "description": set_name, "creatorName": by, "urls": []},
        "sourceset": {
            "modelId": model,
            "name": set_name,
            "description": f"{row['site']}s of recurrent layers, by head",
            "creatorName": by,
            "releaseName": set_name,
            "urls": [],
            "hasDashboards": True,
        },
        "source": {
            "modelId": model,
            "id": source,
            "setName": set_name,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "dataset": row["text"],
            "notes": f"{row['hook_name']}; weights {row['sae']}",
        },
    }
    for name, content in files.items():
        _write(place / f"{name}.jsonl", [content | common])


def _feature(row: dict[str, Any], set_name: str) -> dict[str, Any]:
    """A row of Neuronpedia's table Neuron."""
    edges = row["histogram"]["edges"]
    tokens = {"pos": row["promoted"], "neg": row["suppressed"]}
    return {
        **_key(row, set_name),
        "sourceSetName": set_name,
        "creatorId": _CREATOR,
        "createdAt": _now(),
        "maxActApprox": row["max_coefficient"] or 0,
        "hasVector": False,  # a write is no vector of the residual stream: its server cannot steer with it
        "vector": [],
        "hookName": row["hook_name"],
        "frac_nonzero": row["density"],
        "freq_hist_data_bar_heights": row["histogram"]["counts"],
        "freq_hist_data_bar_values": [(a + b) / 2 for a, b in itertools.pairwise(edges)],
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        **{f"{sign}_str": [x["text"] for x in found] for sign, found in tokens.items()},
        **{f"{sign}_values": [x["shift"] for x in found] for sign, found in tokens.items()},
    }


def _activations(row: dict[str, Any], set_name: str) -> Iterator[dict[str, Any]]:
    """Rows of Neuronpedia's table Activation: the top contexts (marked by -1), and those drawn at random."""
    for number, context in enumerate(row["contexts"]):
        if context["kind"] == "silent":
            continue
        top, values = context["kind"] == "top", context["activations"]
        bins = {"binMin": -1, "binMax": 99, "binContains": -1}
        if not top:
            bins = {"binMin": 0, "binMax": row["max_coefficient"], "binContains": row["density"]}
        yield {
            "id": _id(row, set_name, number),
            **_key(row, set_name),
            "creatorId": _CREATOR,
            "createdAt": _now(),
            "dataSource": row["text"],
            "dataIndex": str(context["passage"]),
            "tokens": context["tokens"],
            "values": values,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "dfaValues": [],
            "lossValues": [],
            "qualifyingTokenIndex": context["at"],
            **bins,
        }


def _explanation(row: dict[str, Any], set_name: str) -> dict[str, Any]:
    """A row of Neuronpedia's table Explanation."""
    return {
        "id": _id(row, set_name, "label"),
        **_key(row, set_name),
        "description": row["label"],
        "authorId": _CREATOR,
        "createdAt": _now(),
        "updatedAt": _now(),
    }


def _key(row: dict[str, Any], set_name: str) -> dict[str, str]:
    model, source = _ids(row, set_name)
    return {"modelId": model, "layer": source, "index": str(row["feature"])}


def _id(row: dict[str, Any], set_name: str, what: int | str) -> str:
    """An id in the form of Neuronpedia's (25 letters and digits, c first), the same for the same content."""
    about = json.dumps([*_ids(row, set_name), row["sae"], row["text"], row["feature"], what])
    return "c" + hashlib.sha256(about.encode()).hexdigest()[:24]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines, compressed where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content, 5) if path.suffix == ".gz" else content)
