"""An evaluation's report as tables for a terminal."""

from ..files.report import shortened, table

_QUERY_WIDTH = 60


def tables(report: dict) -> str:
    """Values with intervals, the comparison, and the curve over dimensions, of what the report file holds."""
    return "\n\n".join([_main_table(report), *_comparison_tables(report), *_curve_table(report)])


def _main_table(done: dict) -> str:
    given, counts = done["arguments"], done["counts"]
    percent = f"{100 * given['confidence']:g}% interval"
    rows = [["", "value", percent]]
    rows += [[name, f"{m['value']:.4f}", f"{m['low']:.4f} to {m['high']:.4f}"] for name, m in done["metrics"].items()]
    title = f"{given['dev_path']}: {counts['queries']:,} queries, {counts['passages']:,} passages"
    title += f", {counts['rejected']:,} bad rows left out" if counts.get("rejected") else ""
    return table(rows, f"{title} -> {given['output_data_path']}")


def _comparison_tables(done: dict) -> list[str]:
    if "comparison" not in done:
        return []
    compared = done["comparison"]
    percent = f"{100 * done['arguments']['confidence']:g}% interval"
    rows = [["", "this", "other", "difference", percent, "p-value"]]
    for name, test in compared["metrics"].items():
        own = done["metrics"][name]["value"]
        interval = f"{test['low']:+.4f} to {test['high']:+.4f}"
        rows.append(
            [
                name,
                f"{own:.4f}",
                f"{test['other']:.4f}",
                f"{test['difference']:+.4f}",
                interval,
                f"{test['p_value']:.4f}",
            ]
        )
    counts = f"{compared['n_won']} queries won, {compared['n_lost']} lost, {compared['n_equal']} equal"
    lines = [table(rows, f"compared with {compared['with']}; by {compared['changes_by']}, {counts}")]
    lacking = [(compared["not_compared"][side], f"only {side} has") for side in ("this", "other")]
    if any(names for names, _ in lacking):
        lines.append("not compared: " + "; ".join(f"{why} {', '.join(names)}" for names, why in lacking if names))
    if compared["settings_apart"]:
        lines.append(
            "\n  ".join(
                ["the two runs encode differently, which the difference includes:", *compared["settings_apart"]]
            )
        )
    for title in ("won_most", "lost_most"):
        changes = [
            f"  {c['other']:.3f} -> {c['this']:.3f}  {shortened(c['query'], _QUERY_WIDTH)}" for c in compared[title]
        ]
        if changes:
            heading = f"{title.replace('_', ' ')} ({compared['changes_by']}: other -> this)"
            lines.append("\n".join([heading, *changes]))
    return lines


def _curve_table(done: dict) -> list[str]:
    if "dimensions" not in done:
        return []
    curves = done["dimensions"]
    rows = [["dimension", *curves]]
    rows += [[name, *(f"{curve[name]['value']:.4f}" for curve in curves.values())] for name in done["metrics"]]
    return [table(rows)]
