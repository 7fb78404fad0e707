"""Prints the JSON lines of the benchmarks as a table, and draws each benchmark's ratios beside its goals (plot.py).

usage: report.py FILE [--plots FOLDER]

Each line has name, config, value, unit, floor (the derived best), peer, peer_value (the same thing done by others in
the same run), ratio (how value compares with peer_value, as the goal counts it), goal and goal_met; null: none.
`./run bench` adds the name of the benchmark.
"""
import argparse
import itertools
import json
import pathlib

import plot

COLUMNS = ("name", "config", "value", "unit", "floor", "peer", "peer_value", "ratio", "goal", "goal_met")
NUMBERS = {"value", "floor", "peer_value", "ratio"}


def shown(value):
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items())
    return str(value)


def print_table(benchmark, results):
    table = [[shown(result.get(column)) for column in COLUMNS] for result in results]
    heads = ["met" if column == "goal_met" else column.replace("_", " ") for column in COLUMNS]
    widths = [max(len(row[i]) for row in [heads, *table]) for i in range(len(COLUMNS))]
    print(f"\n{benchmark}")
    for row in [heads, ["-" * width for width in widths], *table]:
        cells = (cell.rjust(width) if column in NUMBERS else cell.ljust(width)
                 for column, cell, width in zip(COLUMNS, row, widths))
        print("  ".join(cells).rstrip())


def print_summary(results):
    stated = [result for result in results if result.get("goal_met") is not None]
    missed = [result for result in stated if not result["goal_met"]]
    unknown = [result for result in results if result.get("goal") and result.get("goal_met") is None]
    print(f"\n{len(stated) - len(missed)} of {len(stated)} goals met; medians; "
          "floor: the best this machine could do, derived from figures measured in the same run")
    for result in missed:
        figure = result["ratio"] if result.get("ratio") is not None else result["value"]
        print(f"missed: {result['name']}, {shown(result['config'])}: {shown(figure)}, goal {result['goal']}")
    for result in unknown:
        print(f"not measured: {result['name']}, {shown(result['config'])}: {result.get('peer') or 'no peer'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--plots", type=pathlib.Path, help="where bench-NAME.svg go; without it none is drawn")
    options = parser.parse_args()
    results = [json.loads(line) for line in options.file.read_text(encoding="utf-8").splitlines()]
    for benchmark, group in itertools.groupby(results, lambda result: result.get("benchmark", "results")):
        group = list(group)
        print_table(benchmark, group)
        if options.plots and (picture := plot.draw(benchmark, group)):
            path = options.plots / f"bench-{benchmark}.svg"
            path.write_text(picture, encoding="utf-8")
            print(f"picture: {path}")
    print_summary(results)


if __name__ == "__main__":
    main()
