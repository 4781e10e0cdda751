"""The scores of a finished run for a terminal."""

from pathlib import Path

from spice_dist.report.run_folder import SCORES, load

HEADINGS = {"acc": "ACC", "nmi": "NMI", "ari": "ARI", "nmi_geometric": "NMI geo", "ami": "AMI"}


def format_scores(run: Path) -> str:
    """A table of every method's scores against true labels, where there are any, and the label-free numbers."""
    found = load(run)
    lines = []
    if found.has_labels:
        lines.append(" " * 20 + "".join(f"{HEADINGS[name]:>9}" for name in SCORES))
        for method, scores in found.scores.items():
            cells = "".join(f"{(scores or {}).get(name, float('nan')):9.3f}" for name in SCORES)
            lines.append(f"{method:<20}{cells}")
    else:
        lines.append("No true labels, so no ACC, NMI or ARI.")
    metrics = found.metrics
    lines += ["", f"{metrics['n']} images, {metrics['nonempty']} of {metrics['k']} clusters in use"]
    reliable = metrics["reliable"]
    if reliable["count"]:  # IMC-SwAV has none
        lines.append(f"{reliable['count']} reliable labels ({reliable['fraction']:.0%} of the images)")
    if reliable.get("advice"):
        lines.append(reliable["advice"])
    lines.append("without labels: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics["select"].items()))
    lines.append("time: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in metrics["seconds"].items()))
    lines += ["", f"assignments  {run / 'assignments.csv'}", f"report       {run / 'report.html'}"]
    return "\n".join(lines)
