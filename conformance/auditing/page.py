"""The verdict of an audit as a page with curves of the recorded updates, and tables of tensors by group."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.auditing.facts import Facts
from conformance.auditing.merged import WholeUpdate, whole_run
from conformance.auditing.rule import TOPICS
from conformance.auditing.verdict import SIGNS, Verdict, subject
from conformance.errors import UsageError
from conformance.report.rendering import page_templates

LEFT, RIGHT, TOP, BOTTOM = 52, 304, 14, 96


@dataclass(frozen=True)
class Curve:
    """One number of each update, in the coordinates of the picture."""

    title: str
    unit: str
    points: str
    dots: list[tuple[float, float, str]]
    ticks: list[tuple[float, int]]
    top: str
    bottom: str
    middle: str
    """The value, where all are the same."""
    told: str


def write_page(verdict: Verdict, path: Path) -> None:
    """Write the page.

    Raises:
        UsageError: if it cannot be written.
    """
    facts = verdict.facts or Facts()
    templates = page_templates()
    told = verdict.of("fault", "advice", "allowed")
    quiet = {
        words: [finding for finding in verdict.findings if finding.topic == topic and finding not in told]
        for topic, words in TOPICS.items()
    }
    text = templates.get_template("audit.html").render(
        subject=f"{subject(verdict)}.",
        broken=verdict.broken.splitlines()[-1] if verdict.broken else "",
        told=told,
        count=Counter(finding.outcome for finding in verdict.findings),
        compiled=facts.compiled,
        quiet={words: findings for words, findings in quiet.items() if findings},
        signs=SIGNS,
        curves=curves_of(verdict.ranks or [facts]),
        groups=groups_of(facts),
        environment=verdict.environment,
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the page {path} cannot be written: {error.strerror}.") from error


def curves_of(ranks: list[Facts]) -> list[Curve]:
    """Return the curves of what the audit saw: loss, norm of the gradient, learning rate."""
    if not ranks[0].updates:
        return []
    updates = whole_run([facts for facts in ranks if facts.reported]).updates
    losses = [update.entropy if update.entropy is not None else update.loss for update in updates]
    norms = [sum(norm**2 for norm in update.gradients.norms.values()) ** 0.5 or None for update in updates]
    found = [
        curve("Loss", "mean over the targets of an update", losses),
        curve("Gradient norm", "when the step began", norms),
        curve("Learning rate", "the largest of all groups", [largest_rate(update) for update in updates]),
    ]
    return [made for made in found if made is not None]


def largest_rate(update: WholeUpdate) -> float | None:
    """Return the largest learning rate of an update."""
    return max((settings["lr"] for settings in update.settings.values() if "lr" in settings), default=None)


def curve(title: str, unit: str, values: list[float | None]) -> Curve | None:
    """Return the curve of some numbers; None if there are none."""
    known = [(number, value) for number, value in enumerate(values, start=1) if value is not None]
    if not known:
        return None
    low, high = min(value for _, value in known), max(value for _, value in known)
    top, bottom = f"{high:.4g}", f"{low:.4g}"
    width, height = max(len(values) - 1, 1), high - low
    flat = top == bottom  # what differs by less than the labels show is noise, as in a norm that is always clipped

    def across(number: int) -> float:
        return round(LEFT + (RIGHT - LEFT) * (number - 1) / width, 1)

    dots = [
        (
            across(number),
            round(BOTTOM - (BOTTOM - TOP) * (0.5 if flat else (value - low) / height), 1),
            f"{value:.6g}",
        )
        for number, value in known
    ]
    step = max(1, len(values) // 8)
    return Curve(
        title,
        unit,
        " ".join(f"{x},{y}" for x, y, _ in dots),
        dots,
        [(across(number), number) for number in range(1, len(values) + 1, step)],
        "" if flat else top,
        "" if flat else bottom,
        top if flat else "",
        ", ".join(text for _, _, text in dots),
    )


def brief(value: float | tuple[Any, ...]) -> str:
    """Return a setting with six digits at most."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def groups_of(facts: Facts) -> list[dict[str, Any]]:
    """Return each group of the last update: its settings, and its tensors with their gradients."""
    if not facts.updates:
        return []
    last = facts.updates[-1]
    norms = last.measured_gradients.norms if last.measured_gradients is not None else {}
    found = []
    for step in last.steps:
        name = step.optimizer[0].rpartition(".")[2] if step.optimizer else "unknown optimizer"
        for number, group in enumerate(step.groups, start=1):
            rows = []
            for tensor in group.tensors:
                info = facts.trace.tensors.get(tensor)
                rows.append(
                    {
                        "name": tensor,
                        "shape": " \u00d7 ".join(map(str, info.shape)) if info else "",
                        "dtype": str(info.dtype).removeprefix("torch.") if info else "",
                        "norm": f"{norms[tensor].item():.3g}" if tensor in norms else "none",
                    }
                )
            shown = {key: value for key, value in group.settings.items() if isinstance(value, int | float | tuple)}
            settings = ", ".join(f"{key} {brief(value)}" for key, value in shown.items() if value is not False)
            found.append({"title": f"{name}, group {number}: {len(rows)} tensors", "settings": settings, "rows": rows})
    return found
