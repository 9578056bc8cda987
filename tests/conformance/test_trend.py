"""What changed between two releases: told only of one stack on one kind of machine, in the order of the releases."""

from conformance.report.result import Report, Verdict
from conformance.report.trend import release_order, trends


def report(version: str, name: str = "stack", gpu: str = "none", **outcomes: str) -> Report:
    verdicts = {f"ACC-{key[1:]}": Verdict(f"ACC-{key[1:]}", "must", "", outcome) for key, outcome in outcomes.items()}
    return Report(name, version, name, {"gpu": gpu}, False, verdicts)


def test_a_trend_tells_what_is_mended_and_what_is_broken() -> None:
    older = report("5.3.0", a1="fail", a2="error", a3="pass", a4="fail", a5="n/a", a6="fail", a7="pass")
    newer = report("5.24.0", a1="pass", a2="pass", a3="fail", a4="fail", a5="pass", a6="n/a", a8="fail")
    (trend,) = trends([newer, older])
    assert (trend.older, trend.newer) == (older, newer)
    assert trend.mended == ["ACC-1", "ACC-2"]
    assert trend.broken == ["ACC-3"]
    assert trend.failed_by_both == ["ACC-4"]


def test_only_the_next_release_of_the_same_stack_on_the_same_machine_is_compared() -> None:
    found = trends([report("2"), report("10"), report("1"), report("3", name="other"), report("3", gpu="H200")])
    assert [(trend.older.version, trend.newer.version) for trend in found] == [("1", "2"), ("2", "10")]
    assert not trends([report("2"), report("2")]), "the same release twice"


def test_releases_come_in_the_order_of_their_numbers() -> None:
    versions = ["0.2.0", "5.24.0", "5.3.0", "92d63d4e8"]
    assert sorted(versions, key=release_order)[1:] == ["5.3.0", "5.24.0", "92d63d4e8"]
