"""The rows of evaluate.py's table: what the folders of the runs contain."""

import json
import statistics
from pathlib import Path
from typing import Any

from tabulate import tabulate

from transfer.evaluation.fine_tunings import FINE_TUNINGS, FineTuning, Published
from transfer.evaluation.recipe_records import read_started
from transfer.evaluation.runs import find_run_folders, run_folder

_MAX_RECIPE = 60
"""Characters of a recipe in the table."""


def collect_rows(out: Path, name: str, arch: str, seeds: int, skipped: str, recipe: str) -> list[dict[str, Any]]:
    """Return a row for each metric of a fine-tuning: its values by seed, their mean, and a note on missing runs.

    Args:
        arch: the architecture of the encoder; published numbers of others are left out.
        seeds: number of runs of this call, with the seeds 0, 1, ...; all runs in the folder count as well.
        skipped: why this call cannot run those that have not finished; empty if it can.
        recipe: the recipe of this call, for a fine-tuning of which no run was started.

    Returns:
        The rows; none if there are no runs.
    """
    requested = [run_folder(out, name, seed) for seed in range(seeds)]
    folders = list(dict.fromkeys([*requested, *find_run_folders(out, name)]))
    done = [json.loads((path / "done.json").read_text()) for path in folders if (path / "done.json").exists()]
    note = "; ".join(_describe_missing(folders, skipped))
    fine_tuning = FINE_TUNINGS[name]
    common = {"name": name, "title": fine_tuning.title}
    records = done or [record for path in folders if (record := read_started(path))] or [{"recipe": recipe}]
    common["recipe"] = "; ".join(dict.fromkeys(run.get("recipe", "unknown") for run in records))
    rows = []
    published = _find_published(fine_tuning, arch, common["recipe"])
    for metric, keys in fine_tuning.metrics.items() if folders else ():
        values = [value for run in done if (value := _look_up(run["results"], keys)) is not None]
        row: dict[str, Any] = common | {"metric": metric, "values": values, "runs": len(done)}
        row["mean"] = statistics.fmean(values) if values else None
        row["std"] = statistics.stdev(values) if len(values) > 1 else None
        row["published"] = published.values.get(metric) if published else None
        row["published_by"] = published.source if published else None
        row["note"] = note or ("" if values else "the run has no such metric")
        rows.append(row)
    return rows


def _find_published(fine_tuning: FineTuning, arch: str, recipe: str) -> Published | None:
    """Return the published numbers, if they are of this architecture and the recipe is unchanged."""
    published = fine_tuning.published
    return published if published and arch == published.arch and recipe == fine_tuning.recipe else None


def _describe_missing(folders: list[Path], skipped: str) -> list[str]:
    """Return why there are runs without a result, as in `collect_rows`."""
    missing = [path for path in folders if not (path / "done.json").exists()]
    failures = [path / "failed.json" for path in missing if (path / "failed.json").exists()]
    notes = [f"failed: {json.loads(path.read_text())['reason']}, see {path.parent / 'log.txt'}" for path in failures]
    if skipped:
        notes.append(f"skipped: {skipped}")
    elif len(failures) < len(missing):
        notes.append("not finished")
    return notes


def _look_up(results: Any, keys: str) -> float | None:
    """Return the value at `keys`, joined by dots, in nested dicts; None if there is none."""
    for key in keys.split("."):
        results = results.get(key) if results else None
    return results


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, with the mean and the sample standard deviation over the seeds.

    The sources of published numbers and long recipes follow below it.
    """
    long_recipes = [recipe for recipe in dict.fromkeys(row["recipe"] for row in rows) if len(recipe) > _MAX_RECIPE]
    footnotes = {recipe: f"[{number}]" for number, recipe in enumerate(long_recipes, start=1)}
    cells = []
    for row in rows:
        mean = "" if row["mean"] is None else f"{row['mean']:.2f}"
        std = "" if row["std"] is None else f" ± {row['std']:.2f}"
        published = "" if row["published"] is None else f"{row['published']:.1f}"
        recipe = row["recipe"]
        if recipe in footnotes:
            recipe = f"{recipe.partition(':')[0]} {footnotes[recipe]}"
        texts = (row["title"], row["metric"], mean + std, row["runs"], recipe, published, row["note"])
        cells.append([str(text).replace("|", r"\|") for text in texts])
    headers = ("fine-tuning", "metric", "mean ± std", "runs", "recipe", "published", "note")
    table = tabulate(cells, headers, tablefmt="github", disable_numparse=True) + "\n"
    sources = dict.fromkeys(row["published_by"] for row in rows if row["published_by"])
    table += "".join(f"\npublished: {source}\n" for source in sources)
    return table + "".join(f"\n{footnote} {recipe}\n" for recipe, footnote in footnotes.items())
