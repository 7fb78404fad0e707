"""Draws how figures compare with their peers, and the goals, as an SVG without any library.

A line with a ratio is a row: a bar from 1 (as good as the peer) to the ratio on a logarithmic scale, and a black mark
where the goal is. Green: met, red: missed, grey: no goal. An arrow in the mark points to the better side.
"""
import html
import math
import re

ROW, LABEL, CHART, MARGIN, HEAD, FOOT = 20, 560, 460, 70, 46, 34
COLORS = {True: "#3a9a5b", False: "#c8483c", None: "#9aa0a6"}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def goal_of(text):
    """The number a goal asks the ratio to reach, and whether more is better; None: it asks for something else."""
    found = re.search(r"(<=|>=|=)\s*([\d.]+)?", text or "")
    if not found:
        return None
    worked_out = re.search(r"= ([\d.]+)$", text)  # "<= 1.02 x unique / ids = 0.2611"
    number = worked_out[1] if worked_out else found[2] or "1"
    return float(number), found[1] == ">="


def text(x, y, content, anchor="start", size=12, color="#222"):
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}">'
            f"{html.escape(content)}</text>")


def draw(title, results):
    """None when there is nothing to compare."""
    rows = [result for result in results if (result.get("ratio") or 0) > 0]
    if not rows:
        return None
    goals = [goal_of(row.get("goal")) for row in rows]
    numbers = [row["ratio"] for row in rows] + [goal[0] for goal in goals if goal] + [1]
    low, high = math.log(min(numbers) * 0.9), math.log(max(numbers) * 1.1)
    place = lambda ratio: LABEL + (math.log(ratio) - low) / (high - low) * CHART
    bottom = HEAD + ROW * len(rows)
    parts = [text(10, 20, f"{title}: ratio to the peer", size=15),
             text(10, 37, "bar: the ratio, from 1 = as the peer; mark: the goal, pointing to the better side", size=11)]
    for tick in TICKS:
        if low <= math.log(tick) <= high:
            x, weight = place(tick), 1.5 if tick == 1 else 0.4
            parts += [f'<line x1="{x:.1f}" y1="{HEAD}" x2="{x:.1f}" y2="{bottom}" stroke="#555" '
                      f'stroke-width="{weight}"/>', text(x, bottom + 16, f"{tick:g}", "middle", 11)]
    for number, (row, goal) in enumerate(zip(rows, goals)):
        y = HEAD + ROW * number
        a, b = sorted((place(1), place(row["ratio"])))
        parts += [text(LABEL - 8, y + 14, f"{row['name']}: {row['config']}"[:88], "end", 11),
                  f'<rect x="{a:.1f}" y="{y + 4}" width="{max(b - a, 1):.1f}" height="{ROW - 8}" '
                  f'fill="{COLORS[row.get("goal_met")]}"/>',
                  text(LABEL + CHART + 8, y + 14, f"{row['ratio']:.3g}", size=11)]
        if goal:
            x, side = place(goal[0]), 5 if goal[1] else -5
            parts.append(f'<path d="M{x:.1f} {y + 1} V{y + ROW - 1} M{x:.1f} {y + 6} L{x + side:.1f} {y + ROW / 2} '
                         f'L{x:.1f} {y + ROW - 6}" stroke="#000" stroke-width="2" fill="none"/>')
    width, height = LABEL + CHART + MARGIN, bottom + FOOT
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n')
