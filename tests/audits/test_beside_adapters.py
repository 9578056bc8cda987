"""The table of adapters beside audits: what it names is there, and it tells agreement from silence."""

import json

import conformance.auditing.rules  # noqa: F401  # fills RULES
from conformance.auditing.rule import RULES
from conformance.clause import catalogue
from tests.audits.beside_adapters import FOLDER, REPORTS, SAME, STACKS, compared


def test_the_table_names_what_there_is() -> None:
    assert SAME.keys() <= catalogue().keys()
    assert {rule for rules in SAME.values() for rule in rules} <= RULES.keys()
    for stack in STACKS:
        assert (FOLDER / stack.script).is_file()
        assert list((REPORTS / "conformance").glob(stack.report)), stack.report


def test_the_committed_record_is_of_these_stacks() -> None:
    record = json.loads((REPORTS / "audit" / "stacks.json").read_text(encoding="utf-8"))
    assert [row["stack"] for row in record["stacks"]] == [stack.name for stack in STACKS]
    for row in record["stacks"]:
        assert row["looked_at"] >= 20, "an audit that looks at nothing agrees with everything"
        assert row["adapter_fails"].keys() <= catalogue().keys()


def test_silence_is_no_agreement() -> None:
    assert compared("ACC-2", {"mean-of-means": "fault"}) == "named"
    assert compared("LR-3", {"first-rate-0": "advice"}) == "named"
    assert compared("ACC-2", {"mean-of-means": "ok"}) == "ok"
    assert compared("ACC-2", {"mean-of-means": "not looked at"}) == "not looked at"
    assert compared("ACC-2", {}) == "not looked at"
    assert compared("OPT-11", {"mean-of-means": "ok"}) == "no such rule"
