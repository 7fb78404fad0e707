"""Prints the JSON lines of the benchmarks as a table.

usage: report.py FILE

Each line has name, config, value, unit, floor (the derived best), peer, peer_value (the same thing done by others in
the same run), ratio (how value compares with peer_value, as the goal counts it), goal and goal_met; null: none.
"""
import json
import sys

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


def main(path):
    with open(path, encoding="utf-8") as lines:
        results = [json.loads(line) for line in lines]
    table = [[shown(result.get(column)) for column in COLUMNS] for result in results]
    widths = [max(len(row[i]) for row in [list(COLUMNS), *table]) for i in range(len(COLUMNS))]
    heads = [column.replace("_", " ") for column in COLUMNS]
    for row in [heads, ["-" * width for width in widths], *table]:
        cells = (cell.rjust(width) if column in NUMBERS else cell.ljust(width)
                 for column, cell, width in zip(COLUMNS, row, widths))
        print("  ".join(cells).rstrip())
    missed = [result for result in results if result.get("goal_met") is False]
    stated = [result for result in results if result.get("goal_met") is not None]
    print(f"{len(stated) - len(missed)} of {len(stated)} goals met; medians; "
          "floor: the best this machine could do, derived from figures measured in the same run")


if __name__ == "__main__":
    main(*sys.argv[1:])
