"""From facts to findings: every rule says fault, advice, ok, or why it was not looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import conformance.auditing.rules  # noqa: F401  # fills RULES
from conformance.auditing.facts import Facts
from conformance.auditing.rule import RULES, Doubt, Rule, Seen
from conformance.auditing.verdict import OUTCOMES, Finding, Outcome
from conformance.errors import NotApplicable, UsageError, Violation, describe_error
from conformance.report.result import plain


def allowances(given: Sequence[str]) -> dict[str, str]:
    """Return the reason for each rule that is allowed to find something, from ``RULE=reason``."""
    found = {}
    for text in given:
        name, _, reason = text.partition("=")
        if name not in RULES:
            raise UsageError(f"--allow names an unknown rule, {name!r}: the rules are {', '.join(RULES)}.")
        if not reason.strip():
            raise UsageError(f"--allow {name} needs a reason, as in --allow '{name}=why I mean it'.")
        found[name] = reason.strip()
    return found


def judge(rule: Rule, seen: Seen, processes: tuple[int, ...] = ()) -> Finding:
    """Return what one rule finds. A rule that itself fails counts as not looked at, and says so."""
    finding = Finding(rule.name, rule.topic, rule.requirement, "ok", processes=processes)
    try:
        rule.check(seen)
        return finding
    except Violation as violation:
        outcome: Outcome = "advice" if isinstance(violation, Doubt) or rule.kind == "advice" else "fault"
        return replace(
            finding,
            outcome=outcome,
            expected=plain(violation.expected),
            seen=plain(violation.seen),
            why=rule.why,
            mend=rule.mend,
            source=rule.source,
        )
    except NotApplicable as reason:
        return replace(finding, outcome="not looked at", reason=plain(str(reason)))
    except Exception as error:
        words = f"the rule itself failed ({describe_error(error)}): please report this"
        return replace(finding, outcome="not looked at", reason=plain(words))


def judge_alone(facts: Facts, expected: Mapping[str, str]) -> list[Finding]:
    """Return the findings of the rules that judge each process by itself."""
    seen = Seen(facts, [facts], expected)
    chosen = [rule for rule in RULES.values() if not rule.together and rule.topic != "resumed"]
    chosen = [rule for rule in chosen if rule.topic != "expected" or rule.name in asked(expected)]
    processes = (facts.rank,) if facts.world > 1 else ()
    return [judge(rule, seen, processes) for rule in chosen]


def asked(expected: Mapping[str, str]) -> set[str]:
    """Return the rules that judge what the user expects."""
    return {{"no-weight-decay": "expect-no-decay"}.get(name, f"expect-{name}") for name in expected}


def judge_resumed(first: Facts, second: Facts) -> list[Finding]:
    """Return the findings of the rules that compare a resumed run with the one that left its checkpoint."""
    seen = Seen(second, [second], earlier=first)
    return [judge(rule, seen) for rule in RULES.values() if rule.topic == "resumed"]


def judge_together(ranks: list[Facts], expected: Mapping[str, str]) -> list[Finding]:
    """Return the findings of the rules that compare the processes."""
    seen = Seen(ranks[0], ranks, expected)
    return [judge(rule, seen) for rule in RULES.values() if rule.together]


def merged(findings: Sequence[list[Finding]]) -> list[Finding]:
    """Return one finding for each rule: the worst of all processes, and the processes that have it."""
    order = {outcome: number for number, outcome in enumerate(OUTCOMES)}
    result = []
    for own in zip(*findings, strict=True):
        # What one process found ok and another could not look at is ok on that one only.
        worst = min(own, key=lambda finding: order[finding.outcome])
        same = tuple(number for finding in own if finding.outcome == worst.outcome for number in finding.processes)
        result.append(replace(worst, processes=same if worst.outcome != "ok" else ()))
    return result


def with_allowances(findings: list[Finding], allowed: Mapping[str, str]) -> list[Finding]:
    """Return the findings, with those of allowed rules marked as allowed and given their reasons."""
    return [
        replace(finding, outcome="allowed", reason=allowed[finding.rule])
        if finding.rule in allowed and finding.outcome in ("fault", "advice")
        else finding
        for finding in findings
    ]
