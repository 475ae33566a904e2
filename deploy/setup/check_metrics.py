#!/usr/bin/env python3
"""Checks that dashboards and alerts speak of metrics that the programs export.

Every `lockstep_*` name in dashboards/*.json and deploy/prometheus/*.yml must stand as a string in the Rust
sources. With --queries FILE, the dashboards' queries are written there as a rules file, so that
`promtool check rules FILE` can check their syntax.
"""

import argparse
import json
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
METRIC = re.compile(r"\blockstep_[a-z0-9_]+")
HISTOGRAM_SUFFIX = re.compile(r"_(bucket|sum|count)$")
# Grafana's variables, replaced by something PromQL accepts.
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$__interval": "1m", "$job": ".+", "$instance": ".+"}


def exported_metrics():
    """The metric names in the Rust sources."""
    names = set()
    for crate in ("common", "coordinator", "worker"):
        for source in (REPO / crate).rglob("*.rs"):
            names.update(re.findall(r'"(lockstep_[a-z0-9_]+)"', source.read_text(encoding="utf-8")))
    return names


def panels_of(dashboard):
    """All panels, those inside rows too."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=Path, help="write the dashboards' queries here, as a rules file")
    arguments = parser.parse_args()

    errors, queries = [], []
    exported = exported_metrics()

    def check_names(where, text):
        for name in set(METRIC.findall(text)):
            if name not in exported and HISTOGRAM_SUFFIX.sub("", name) not in exported:
                errors.append(f"{where}: no program exports `{name}`")

    for path in sorted((REPO / "dashboards").glob("*.json")):
        where = path.relative_to(REPO)
        try:
            dashboard = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            errors.append(f"{where}:{error.lineno}: {error.msg}")
            continue
        ids = [panel["id"] for panel in panels_of(dashboard)]
        if len(ids) != len(set(ids)):
            errors.append(f"{where}: two panels share an id")
        for panel in panels_of(dashboard):
            for target in panel.get("targets", []):
                check_names(f"{where}: panel `{panel['title']}`", target["expr"])
                queries.append(target["expr"])

    for path in sorted((REPO / "deploy" / "prometheus").glob("*.yml")):
        # Group names and file names may begin with the prefix too; metrics are those in expressions and series.
        text = "\n".join(re.findall(r"^\s*(?:- )?(?:expr|series):(.*(?:\n(?!\s*[a-z_-]+:).*)*)", path.read_text(), re.M))
        check_names(path.relative_to(REPO), text)

    if arguments.queries:
        lines = ["groups:", "  - name: dashboards", "    rules:"]
        for number, query in enumerate(queries):
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            lines += [f"      - record: dashboard:query{number}", f"        expr: {json.dumps(query)}"]
        arguments.queries.write_text("\n".join(lines) + "\n", encoding="utf-8")

    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        print("hint: rename it in the dashboard or alert, or export it", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
