"""`make bench-accuracy`: what the small recipes of jobs/fashion reach, with how many images and in which time.

Every recipe is run as it stands, by the real programs. Seconds are those of the training steps alone: without start,
evaluation and checkpoints.
"""

import argparse
import json
import os
import subprocess
import tomllib
from pathlib import Path


def train(coordinator, recipe, workers):
    """Runs one recipe. Returns what its metrics say."""
    job = tomllib.loads(recipe.read_text())
    command = [coordinator, "run", recipe, "--workers", str(workers)]
    # The run's summary, a table, goes to stderr; the last line of stdout is JSON.
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    done = json.loads(output.splitlines()[-1])
    metrics = Path(os.environ["LOCKSTEP_DATA_DIR"], "jobs", done["job"], "metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line]
    tests = [line for line in lines if "test_top1" in line]
    last = len(steps) // 10 or 1
    return {
        "recipe": recipe.stem,
        "model": job["model"]["name"],
        "images": sum(step["samples"] for step in steps),
        "seconds": sum(step["seconds"] for step in steps),
        "first_loss": sum(step["loss"] for step in steps[:last]) / last,
        "last_loss": sum(step["loss"] for step in steps[-last:]) / last,
        "test_top1": tests[-1]["test_top1"],
        "test_top5": tests[-1]["test_top5"],
        "weights": done["weights_digest"],
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("recipes", nargs="*", help="names of files in jobs/fashion, all by default")
    arguments = parser.parse_args()
    folder = Path("jobs/fashion")
    recipes = [folder / f"{name}.toml" for name in arguments.recipes] or sorted(folder.glob("*.toml"))
    recipes = [recipe for recipe in recipes if 'task = "classify"' in recipe.read_text()]
    print(f"{'recipe':24} {'images':>8} {'seconds':>8} {'loss':>16} {'top-1':>7} {'top-5':>7}")
    rows = []
    for recipe in recipes:
        row = train(arguments.coordinator, recipe, arguments.workers)
        rows.append(row)
        loss = f"{row['first_loss']:.3f} -> {row['last_loss']:.3f}"
        print(f"{row['recipe']:24} {row['images']:8} {row['seconds']:8.1f} {loss:>16} "
              f"{100 * row['test_top1']:6.2f}% {100 * row['test_top5']:6.2f}%", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"workers": arguments.workers, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
