"""lm-evaluation-harness over a CrossPool server, beside the same tasks over transformers.

``python -m benchmark.conformance.lm_eval --python FOLDER/bin/python`` makes two small tasks, one of
log-likelihoods and one of greedy generation, and runs both with ``local-completions`` and with
``hf``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmark.records import ROOT
from benchmark.server import DEMO, TINY_MODELS, Server, one_device

CLOSE = 1e-3
"""Difference of two log-likelihoods, each a sum over a choice's tokens, that counts as none."""
QUESTIONS = (
    ("The import statement", (" is used to", " are blue", " of the sea")),
    ("A list comprehension", (" consists of brackets", " was asleep", " seven")),
    ("If the file does not exist, an", (" exception is raised", " elephant", " apple pie")),
    ("Return the", (" number of", " king", " ticket")),
    ("The default value is", (" None", " Tuesday", " a river")),
    ("This function", (" returns a string", " rains", " sang loudly")),
    ("class Point:\n    def", (" __init__(self", " 42", " the")),
    ("The keys of a dictionary", (" must be hashable", " open doors", " jump")),
)
"""Beginnings of sentences, each with its endings; the first is right."""


def write_tasks(folder: Path) -> list[str]:
    """Write both tasks and their data; return the tasks' names."""
    data = folder / "questions.jsonl"
    rows = ({"text": text, "choices": choices, "label": 0} for text, choices in QUESTIONS)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    tasks: dict[str, dict[str, Any]] = {
        "crosspool_choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "crosspool_words": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return list(tasks)


def evaluate(
    python: str, folder: Path, tasks: Sequence[str], kind: str, arguments: str
) -> dict[str, Any]:
    """Run lm-evaluation-harness; return its results and each task's answers in order."""
    output = folder / kind
    command = [python, "-m", "lm_eval", "run", "--model", kind, "--model_args", arguments]
    command += ["--tasks", *tasks, "--include_path", str(folder), "--output_path", str(output)]
    command += ["--log_samples", "--batch_size", "1"]
    if kind == "hf":
        command += ["--device", "cpu"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    if ended.returncode:
        raise RuntimeError(f"lm_eval ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    results = json.loads(next(output.rglob("results_*.json")).read_text())["results"]
    answers = {}
    for task in tasks:
        lines = next(output.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
        rows = sorted((json.loads(line) for line in lines), key=lambda row: int(row["doc_id"]))
        answers[task] = [row["filtered_resps"] for row in rows]
    return {"results": results, "answers": answers}


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[list[str], bool]:
    """Return lines that tell both runs' figures, and whether they are the same."""
    lines, same = [], True
    for task, figures in theirs["results"].items():
        for metric, value in figures.items():
            if isinstance(value, (int, float)) and "stderr" not in metric:
                other = ours["results"][task][metric]
                lines.append(f"{task:20}{metric:28}{other:12.6g}{value:12.6g}")
                same = same and abs(other - value) < 1e-9
    pairs = [
        (float(a[0]), float(b[0]), a[1] == b[1])
        for mine, other in zip(
            ours["answers"]["crosspool_choices"],
            theirs["answers"]["crosspool_choices"],
            strict=True,
        )
        for a, b in zip(mine, other, strict=True)
    ]
    furthest = max(abs(a - b) for a, b, _ in pairs)
    lines.append(f"log-likelihoods: {len(pairs)}, furthest apart {furthest:.2g}")
    written = zip(
        ours["answers"]["crosspool_words"], theirs["answers"]["crosspool_words"], strict=True
    )
    equal = [mine == other for mine, other in written]
    lines.append(f"generated texts: {len(equal)}, of which {sum(equal)} are the same")
    same = same and furthest < CLOSE and all(greedy for *_, greedy in pairs) and all(equal)
    return lines, same


def main() -> int:
    """Return 0 where both give the same numbers, 1 where they do not."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.conformance.lm_eval")
    parser.add_argument(
        "--python", type=os.path.abspath, required=True, help="Python that has lm_eval"
    )
    parser.add_argument("--model", choices=TINY_MODELS, default=TINY_MODELS[0])
    arguments = parser.parse_args()
    path = DEMO / arguments.model
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = write_tasks(folder)
        flags = [*one_device(), "--dtype", "float32", "--kv-pool-bytes", "128MiB"]
        with Server(flags) as server:
            served = f"model={arguments.model},base_url={server.url}/v1/completions"
            served += f",tokenizer={path},num_concurrent=2"
            ours = evaluate(arguments.python, folder, tasks, "local-completions", served)
        theirs = evaluate(arguments.python, folder, tasks, "hf", f"pretrained={path},dtype=float32")
    print(f"{arguments.model}: CrossPool's figure, then transformers'")
    lines, same = compare(ours, theirs)
    print("\n".join(lines))
    print("the same" if same else f"NOT the same; the server is that of {ROOT}")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
