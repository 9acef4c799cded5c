"""The guards of the scripts, each with what is left when it is taken out, and the tests that must notice.

``python -m tests.mutations`` runs those tests once for each mutation, in a process of its own that is
forked from one which has imported all there is to import, and writes what came of each test as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import flask.testing
import hypothesis
import pytest
import redis

import luasession.scripts

#: What is imported before the forks, so that it is imported once.
IMPORTED = (flask.testing, hypothesis, redis)

#: What each killer comes to: as it should, by an assertion, or by whatever else.
PASSED, FAILED, BROKEN = "passed", "failed", "broken"

#: A test that every mutated script must pass, so that none is red for the wrong reason.
CONTROL = "test_g1_disjoint_keys.py::test_a_request_inside_another_keeps_both_keys[valkey-9.1]"


@dataclass(frozen=True, slots=True)
class Mutation:
    """One guard, taken out.

    :param old: occurs once in the script.
    :param killers: the tests of which one at least must fail.
    """

    name: str
    script: str
    old: str
    new: str
    killers: tuple[str, ...]


def _valkey(*tests: str) -> tuple[str, ...]:
    return tuple(f"{test}[valkey-9.1]" for test in tests)


MUTATIONS = (
    Mutation(
        "existence",
        "commit",
        "if create == (identity and true or false) then",
        "if false then",
        _valkey("test_g7_dead_stays_dead.py::test_a_creation_finds_nothing_and_a_commit_something"),
    ),
    Mutation(
        "tombstone",
        "commit",
        "if ended then",
        "if false then",
        ("test_g7_dead_stays_dead.py::test_twenty_writers_cannot_undo_a_logout[valkey-9.1-destroy]",),
    ),
    Mutation(
        "age at a tombstone",
        "commit",
        "(#ended == 7 and opened < parse('>I7', ended)) and 'gone'",
        "true and 'gone'",
        _valkey("test_g7_dead_stays_dead.py::test_a_blind_write_after_the_end_starts_anew"),
    ),
    Mutation(
        "digest",
        "commit",
        "if digest ~= '' and not is_current and not promoted then",
        "if false then",
        ("test_interleavings.py::test_three_requests_and_an_end[rotate_and_drop-count-set_k]",),
    ),
    Mutation(
        "former digest",
        "commit",
        "if may == ALL or before == 1 and may == COMMIT and new_digest == '' then",
        "if false then",
        ("test_interleavings.py::test_three_requests_and_an_end[set_k-rotate-count]",),
    ),
    Mutation(
        "age of a former digest",
        "commit",
        "code, before = 'stale', opened < moment and 1 or 0",
        "code, before = 'stale', 1",
        ("test_interleavings.py::test_three_requests_and_an_end[set_k-rotate-count]",),
    ),
    Mutation(
        "a rotation that drops what is open",
        "commit",
        "if may == ALL or before == 1 and may == COMMIT and new_digest == '' then",
        "if may == ALL or before == 1 and new_digest == '' then",
        ("test_interleavings.py::test_three_requests_and_an_end[rotate_and_drop-count-set_k]",),
    ),
    Mutation(
        "a rotation under a former digest",
        "commit",
        "if may == ALL or before == 1 and may == COMMIT and new_digest == '' then",
        "if may == ALL or before == 1 and may == COMMIT then",
        ("test_interleavings.py::test_three_requests_and_an_end[rotate-rotate-set_k]",),
    ),
    Mutation(
        "clear",
        "commit",
        "if cleared and not clear then",
        "if false then",
        _valkey("test_g7_dead_stays_dead.py::test_clear_and_new_keys_keeps_exactly_the_new_keys"),
    ),
    Mutation(
        "clear over a clear",
        "commit",
        "if cleared and not clear then",
        "if cleared then",
        ("test_interleavings.py::test_three_requests_and_an_end[clear_and_set-clear_and_set-set_k]",),
    ),
    Mutation(
        "base before a clear",
        "commit",
        "if base_version < clear_version or base_lost then return {'gone', write_id, now_us} end",
        "",
        _valkey("test_g7_dead_stays_dead.py::test_clear_and_new_keys_keeps_exactly_the_new_keys"),
    ),
    Mutation(
        "blind write before a clear",
        "commit",
        "elseif opened < clear_moment then",
        "elseif false then",
        _valkey("test_g7_dead_stays_dead.py::test_clear_and_new_keys_keeps_exactly_the_new_keys"),
    ),
    Mutation(
        "write id in the ring",
        "commit",
        "if found then",
        "if false then",
        (
            "test_g6_exactly_once.py::test_a_commit_whose_reply_is_lost_is_applied_once[valkey-9.1-blind set-1]",
        ),
    ),
    Mutation(
        "floor of the ring",
        "commit",
        "if floor_us > 0 and now_us - resend <= floor_us + TRANSIT then return {'unknown', write_id, now_us} end",
        "",
        ("test_g6_exactly_once.py::test_past_the_ring_nobody_can_tell[valkey-9.1-blind set]",),
    ),
    Mutation(
        "end of the journal",
        "commit",
        "base_known = base_version == number and prefix == floor_id",
        "base_known = true",
        _valkey("test_g3_same_key.py::test_a_conflict_beyond_the_journal_is_still_one"),
    ),
    Mutation(
        "pair in the journal",
        "commit",
        "if number == base_version and id == prefix then base_known = true end",
        "if number == base_version then base_known = true end",
        _valkey("test_g3_same_key.py::test_a_base_of_a_lost_future_is_a_conflict"),
    ),
    Mutation(
        "base of a lost future at a clear",
        "commit",
        "if base_version < clear_version or base_lost then",
        "if base_version < clear_version then",
        _valkey("test_g7_dead_stays_dead.py::test_a_base_of_a_lost_future_is_from_before_the_clear"),
    ),
    Mutation(
        "size",
        "commit",
        "if after > max_bytes and after > bytes then",
        "if false then",
        _valkey("test_g12_values.py::test_a_session_may_have_so_many_bytes"),
    ),
    Mutation(
        "size of what does not grow",
        "commit",
        "if after > max_bytes and after > bytes then",
        "if after > max_bytes then",
        _valkey("test_g12_values.py::test_what_does_not_grow_passes"),
    ),
    Mutation(
        "conflict check",
        "commit",
        "if #conflict > 0 then",
        "if false then",
        _valkey("test_g3_same_key.py::test_raise_stores_nothing_and_answers_409"),
    ),
    Mutation(
        "reads of a serializable request",
        "commit",
        "look(name, 2)",
        "",
        ("test_interleavings.py::test_write_skew[two]",),
    ),
    Mutation(
        "reads of all keys",
        "commit",
        "    conflict[#conflict + 1] = '*'\n    conflict[#conflict + 1] = false\n",
        "",
        _valkey("test_g3_same_key.py::test_write_skew_under_raise_and_serializable"),
    ),
    Mutation(
        "own write ids",
        "commit",
        "number > base_version and not own:find(id, 1, true)",
        "number > base_version",
        _valkey("test_g3_same_key.py::test_an_own_commit_is_no_conflict"),
    ),
    Mutation(
        "cancelled offer",
        "commit",
        "if offered and offered ~= by then",
        "if false then",
        (
            "test_renewal.py::test_a_cancelled_offer_logs_nobody_out[valkey-9.1-blind write]",
            "test_renewal.py::test_a_cancelled_offer_still_logs_out[valkey-9.1-destroy]",
        ),
    ),
    Mutation(
        "ring of a creation",
        "commit",
        "ring = ring or pack(RING, 0, committed, 0) .. last_id",
        "ring = ring or pack(RING, 0, committed, 0)",
        _valkey("test_g6_exactly_once.py::test_a_session_of_one_commit_keeps_no_ring"),
    ),
    Mutation(
        "journal of a creation",
        "commit",
        "journal = journal or state:sub(1, 8)",
        "journal = journal or state:sub(1, 4) .. state:sub(1, 4)",
        _valkey("test_g3_same_key.py::test_the_creation_is_in_the_journal"),
    ),
    Mutation(
        "journal of a creation in a load",
        "load",
        "if version == 1 then journal = journal or state:sub(1, 8) end",
        "",
        _valkey("test_lost_future.py::test_a_change_on_what_is_lost_is_read_whole"),
    ),
    Mutation(
        "HSET before a deletion",
        "commit",
        "redis.call('HSET', session, '@v', new_state, '@r',",
        "if #removed > 0 and not clear then redis.call('HDEL', session, removed[1]) end\n"
        "redis.call('HSET', session, '@v', new_state, '@r',",
        ("test_g14_redis_down.py::test_out_of_memory_changes_nothing[valkey-9.1-delete and set]",),
    ),
    Mutation(
        "HSET before a new TTL",
        "commit",
        "redis.call('HSET', session, '@v', new_state, '@r',",
        "if due then redis.call('PEXPIRE', session, ends - now) end\n"
        "redis.call('HSET', session, '@v', new_state, '@r',",
        ("test_g14_redis_down.py::test_out_of_memory_changes_nothing[valkey-9.1-new lifetime]",),
    ),
    Mutation(
        "HSET before the DEL of a clear",
        "commit",
        "  redis.call('HSET', session, '@v', state)\n  redis.call('DEL', session)",
        "  redis.call('DEL', session)",
        ("test_g14_redis_down.py::test_out_of_memory_changes_nothing[valkey-9.1-clear and set]",),
    ),
    Mutation(
        "tombstone met by a load",
        "load",
        "if ended then",
        "if false then",
        _valkey("test_g7_dead_stays_dead.py::test_a_read_after_the_end_starts_nothing"),
    ),
    Mutation(
        "age at a tombstone met by a load",
        "load",
        "(#ended == 7 and opened < parse('>I7', ended)) and 'gone' or 'missing'",
        "'missing'",
        _valkey("test_g7_dead_stays_dead.py::test_a_read_after_the_end_starts_nothing"),
    ),
    Mutation(
        "a digest from before the former ones",
        "commit",
        "if code == 'missing' and opened < oldest then code, before = 'stale', 1 end",
        "",
        ("test_g8_grace.py::test_more_rotations_than_a_session_remembers[valkey-9.1-write-5]",),
    ),
    Mutation(
        "a digest from before the former ones, met by a load",
        "load",
        "if code == 'missing' and opened < oldest then code, before = 'stale', 1 end",
        "",
        ("test_g8_grace.py::test_more_rotations_than_a_session_remembers[valkey-9.1-late_look-5]",),
    ),
    Mutation(
        "former digest met by a load",
        "load",
        "if is_former == 0 then return {code, call_id, now_us, before} end",
        "",
        ("test_interleavings.py::test_three_requests_and_an_end[set_k-rotate-count]",),
    ),
    Mutation(
        "base in the journal of a load",
        "load",
        "if everything or not known then names = nil end",
        "if everything then names = nil end",
        ("test_g10_bounded_staleness.py::test_a_base_beyond_the_journal_is_read_whole[valkey-9.1]",),
    ),
    Mutation(
        "everything in the journal of a load",
        "load",
        "if everything or not known then names = nil end",
        "if not known then names = nil end",
        _valkey("test_g10_bounded_staleness.py::test_a_clear_elsewhere_is_read_whole"),
    ),
    Mutation(
        "digest of a log-out",
        "destroy",
        "if not honoured then return {'missing', call_id, now_us} end",
        "",
        _valkey("test_g11_strict_ids.py::test_a_wrong_secret_ends_nothing"),
    ),
    Mutation(
        "log-out under a former digest",
        "destroy",
        "honoured = honoured or (former == digest and now < grace_end)",
        "honoured = honoured or false",
        ("test_interleavings.py::test_three_requests_and_an_end[rotate-destroy-set_k]",),
    ),
    Mutation(
        "grace of a former digest",
        "commit",
        "if former == digest and now < grace_end then",
        "if former == digest then",
        ("test_g8_grace.py::test_after_the_grace_a_former_secret_is_none[valkey-9.1-write]",),
    ),
    Mutation(
        "grace of a former digest met by a load",
        "load",
        "if former == digest and now < grace_end then",
        "if former == digest then",
        ("test_g8_grace.py::test_after_the_grace_a_former_secret_is_none[valkey-9.1-read]",),
    ),
    Mutation(
        "grace of a former digest met by a log-out",
        "destroy",
        "(former == digest and now < grace_end)",
        "former == digest",
        ("test_g8_grace.py::test_after_the_grace_a_former_secret_is_none[valkey-9.1-destroy]",),
    ),
    Mutation(
        "a rotation over a clear",
        "commit",
        "if code == 'stale' and base_version and cleared",
        "if false and base_version and cleared",
        ("test_g8_grace.py::test_a_rotation_over_a_clear[valkey-9.1-True-False]",),
    ),
    Mutation(
        "a rotation over a clear, with a clear of its own",
        "commit",
        "if code == 'stale' and base_version and cleared and not clear and",
        "if code == 'stale' and base_version and cleared and",
        ("test_g8_grace.py::test_a_rotation_over_a_clear[valkey-9.1-True-True]",),
    ),
    Mutation(
        "interval of a short lifetime",
        "commit",
        "math.floor(lifetime / 2)",
        "math.floor(lifetime / 0.001)",
        ("test_g13_expiry.py::test_a_lifetime_shorter_than_the_set_interval_slides[valkey-9.1]",),
    ),
    Mutation(
        "form of a stored lifetime",
        "commit",
        "if own_lifetime and (not own_lifetime:find('^[1-9]%d*$') or #own_lifetime > 14)",
        "if false",
        ("test_fuzz.py::test_a_stored_lifetime_that_is_none[json-write--5]",),
    ),
    Mutation(
        "form of a stored lifetime met by a load",
        "load",
        "if own_lifetime and (not own_lifetime:find('^[1-9]%d*$') or #own_lifetime > 14)",
        "if false",
        ("test_fuzz.py::test_a_stored_lifetime_that_is_none[json-see--5]",),
    ),
    Mutation(
        "a renewed secret in force",
        "commit",
        "if may == ALL or before == 1 and may == COMMIT and new_digest == '' then",
        "if before == 1 and may >= COMMIT and new_digest == '' then",
        _valkey("test_renewal.py::test_the_old_id_is_in_force_for_the_grace"),
    ),
    Mutation(
        "a renewed secret in force over a rotation",
        "commit",
        "math.min(may_still, limit)",
        "may_still",
        _valkey("test_renewal.py::test_a_rotation_ends_what_a_renewal_left_in_force"),
    ),
    Mutation(
        "an offer that a rotation cancels",
        "commit",
        "elseif had_pending and not pending then",
        "elseif false then",
        _valkey("test_renewal.py::test_an_explicit_rotation_cancels_an_offer"),
    ),
    Mutation(
        "one offer in a grace",
        "load",
        "if now - since >= renew_after and now - offered >= grace then",
        "if now - since >= renew_after then",
        _valkey("test_renewal.py::test_an_offer_is_made_once_in_a_grace"),
    ),
    Mutation(
        "log-out under an offer",
        "destroy",
        "or pending and digest == pending:sub(1, 32)",
        "",
        ("test_renewal.py::test_a_logout_that_overlaps_a_renewal_logs_out[valkey-9.1-offered-destroy]",),
    ),
    Mutation(
        "log-out sent again",
        "destroy",
        "if resend == 0 then return {'missing', call_id, now_us} end",
        "if true then return {'missing', call_id, now_us} end",
        _valkey("test_g6_exactly_once.py::test_a_log_out_whose_reply_is_lost_is_a_log_out"),
    ),
    Mutation(
        "youth of an entry",
        "index",
        "if moment and now_us - tonumber(moment) >= youth_us then",
        "if moment then",
        ("test_principals.py::test_log_in_against_log_out_everywhere[True-new visitor]",),
    ),
    Mutation(
        "an index of sessions without an end",
        "index",
        "needed > 0 and left ~= -1 and left < needed",
        "needed > 0",
        _valkey("test_principals.py::test_an_index_is_kept_for_the_longest_session"),
    ),
    Mutation(
        "an end in the place of a ttl",
        "commit",
        "if ttl >= KEPT then",
        "if ttl == KEEP then",
        ("test_commit_and_update.py::test_a_change_keeps_the_end_of_a_key[valkey-9.1-in place]",),
    ),
    Mutation(
        "an end that is known of a field that is gone",
        "commit",
        "if not due_then and ttl < KEEP and",
        "if false and",
        ("test_commit_and_update.py::test_a_change_of_a_key_that_others_changed[valkey-9.1-deleted]",),
    ),
    Mutation(
        "an end that is known of a field that is there",
        "commit",
        "if not due_then and ttl < KEEP and length == 0 then",
        "if not due_then and ttl < KEEP then",
        ("test_commit_and_update.py::test_a_change_of_a_key_that_others_changed[valkey-9.1-set anew]",),
    ),
    Mutation(
        "an end that is known over a clear",
        "commit",
        "local has_old = not clear and not create",
        "local has_old = not create",
        ("test_commit_and_update.py::test_what_becomes_of_an_end[valkey-9.1-no end-kept, later-True]",),
    ),
    Mutation(
        "an end that has passed",
        "commit",
        "lapsed = due_then and due_then <= now",
        "lapsed = false",
        ("test_commit_and_update.py::test_what_becomes_of_an_end[valkey-9.1-gone-kept, past-False]",),
    ),
    Mutation(
        "the short end of an emptied session",
        "commit",
        "(due and not pending and not emptied and 1 or 0)",
        "(due and not pending and 1 or 0)",
        _valkey("test_g13_expiry.py::test_an_emptied_permanent_session_keeps_its_cookies"),
    ),
    Mutation(
        "the short end of an emptied session met by a load",
        "load",
        "if not pending and (fields > 0 or principal) then flags = 1 end",
        "if not pending then flags = 1 end",
        ("test_g13_expiry.py::test_use_of_an_emptied_session_sends_no_short_end[valkey-9.1-0]",),
    ),
    Mutation(
        "an emptied session of a user met by a load",
        "load",
        "(fields > 0 or principal)",
        "(fields > 0)",
        _valkey("test_g13_expiry.py::test_an_emptied_session_of_a_user_slides_as_ever"),
    ),
    Mutation(
        "an index that had an end",
        "index",
        "if needed == 0 and left >= 0 then needed = FOR_GOOD end",
        "",
        _valkey("test_principals.py::test_an_index_that_had_an_end_is_kept_for_sessions_without_one"),
    ),
    Mutation(
        "an index that is new",
        "index",
        "if needed == 0 and left >= 0 then",
        "if needed == 0 then",
        _valkey("test_principals.py::test_an_index_ends_with_the_last_absolute_lifetime"),
    ),
)


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """Have the package read the scripts with one guard taken out, within the block."""
    mutation = next(mutation for mutation in MUTATIONS if mutation.name == name)
    folder = luasession.scripts._folder()
    with tempfile.TemporaryDirectory() as copies:
        for script in ("load", "commit", "destroy", "index"):
            text = (folder / f"{script}.lua").read_text()
            if script == mutation.script:
                assert text.count(mutation.old) == 1, f"{name}: not once in {script}.lua: {mutation.old}"
                text = text.replace(mutation.old, mutation.new)
            (Path(copies) / f"{script}.lua").write_text(text)
        with patch.object(luasession.scripts, "_folder", lambda: Path(copies)):
            luasession.scripts.script.cache_clear()
            try:
                yield
            finally:
                luasession.scripts.script.cache_clear()


class _Verdicts:
    """A plugin that notes what each test came to."""

    def __init__(self) -> None:
        self.by_test: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if report.failed:
            told = call.when == "call" and call.excinfo is not None
            by_assertion = told and call.excinfo.errisinstance((AssertionError, pytest.fail.Exception))
            self.by_test[item.nodeid] = FAILED if by_assertion else BROKEN
        elif call.when == "call":
            self.by_test.setdefault(item.nodeid, PASSED)
        return report


def _run(name: str | None, tests: list[str]) -> dict[str, str]:
    """Run tests under a mutation, or under none, and return what came of them."""
    verdicts = _Verdicts()
    arguments = ["-q", "--assert=plain", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    if name is None:
        pytest.main(arguments, [verdicts])
    else:
        with mutated(name):
            pytest.main(arguments, [verdicts])
    return {test: verdicts.by_test.get(f"tests/{test}", BROKEN) for test in tests}


def _fork(name: str | None, tests: list[str], folder: Path, number: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with (folder / f"{number}.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            (folder / f"{number}.json").write_text(json.dumps([name, _run(name, tests)]))
        status = 0
    except BaseException:  # noqa: BLE001 - nothing may get past the fork
        traceback.print_exc()
    finally:
        os._exit(status)


def main(processes: int = 2) -> None:
    """Run all mutations, and print what each killer came to: by name of the mutation, "" for none."""
    killers = sorted({killer for mutation in MUTATIONS for killer in mutation.killers} | {CONTROL})
    jobs: list[tuple[str | None, list[str]]] = [(None, killers)]
    jobs += [(mutation.name, [CONTROL, *mutation.killers]) for mutation in MUTATIONS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running: set[int] = set()
        for number, (mutation, tests) in enumerate(jobs):
            if len(running) >= processes:
                running.discard(os.wait()[0])
            running.add(_fork(mutation, tests, folder, number))
        while running:
            running.discard(os.wait()[0])
        found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
        logs = {number: (folder / f"{number}.log").read_text() for number in range(len(jobs))}
    verdicts = {mutation or "": verdict for mutation, verdict in found}
    json.dump({"verdicts": verdicts, "log": logs[0][-5000:]}, sys.stdout)


if __name__ == "__main__":
    main()
