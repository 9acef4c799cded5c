"""What OWASP asks of session management, where luasession does it, and the tests that show it.

The requirements are those of the OWASP Session Management Cheat Sheet (by the name of the section) and of
the ASVS 5.0 (by number; chapter 7, and of others what is about session ids). The table in the README,
section "Security", is this one.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from flask import session

from .conftest import MakeApp
from .readme import PATH, readme

TESTS = Path(__file__).parent
BEGIN, END = "<!-- security table: begin -->\n", "<!-- security table: end -->\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One requirement.

    :param sheet: the section of the cheat sheet.
    :param asvs: the numbers in the ASVS 5.0.
    :param where: how luasession meets it, for the table.
    :param tests: ``file::test`` of what shows it.
    """

    sheet: str
    asvs: str
    where: str
    tests: tuple[str, ...]


ROWS = (
    Row(
        "Session ID Length; Session ID Entropy",
        "7.2.3",
        "256 random bits of secret (`SESSION_ID_LENGTH`, 128 at least) beside 128 of handle, from the system's"
        " generator (`os.urandom`)",
        ("test_ids::test_all_bits_are_random", "test_ids::test_no_two_are_alike", "test_ids::test_the_form"),
    ),
    Row(
        "Session ID Content (or Value)",
        "7.2.2",
        "the id means nothing; all data is on the server",
        ("test_ids::test_the_form", "test_stolen_store::test_nothing_that_is_stored_opens_a_session"),
    ),
    Row(
        "Session ID Generation and Verification: Permissive and Strict",
        "7.2.1",
        "an id that the server did not issue is never adopted; checked in Redis, and by the cache as there",
        (
            "test_g11_strict_ids::test_an_unknown_id_is_never_adopted",
            "test_g11_strict_ids::test_the_cache_checks_the_secret",
            "test_fuzz::test_cookies",
        ),
    ),
    Row(
        "Manage Session ID as Any Other User Input",
        "",
        "length and alphabet are checked before Redis is asked",
        ("test_g11_strict_ids::test_malformed_ids_send_no_command", "test_fuzz::test_cookies"),
    ),
    Row(
        "Renew the Session ID After Any Privilege Level Change",
        "7.2.4",
        "`session.regenerate()`, called at log-in and log-out by itself with Flask-Login: the old id reads and"
        " writes nothing from then on",
        (
            "test_login::test_a_log_in_rotates_and_sets_the_principal",
            "test_fixation::test_log_in_then_attack",
            "test_fixation::test_attack_opens_then_log_in_then_attack_goes_on",
            "test_fixation::test_warm_elsewhere_then_log_in_then_attack",
            "test_late_answers::test_who_logs_in_ends_logged_in",
        ),
    ),
    Row(
        "Renewal Timeout",
        "",
        "`SESSION_RENEW_AFTER`, off unless set; in two phases, so that a lost answer logs nobody out",
        (
            "test_renewal::test_a_due_id_is_renewed",
            "test_renewal::test_the_old_id_is_in_force_for_the_grace",
            "test_renewal::test_in_every_order_the_browser_stays_logged_in",
            "test_renewal::test_a_rotation_ends_what_a_renewal_left_in_force",
        ),
    ),
    Row(
        "Idle Timeout",
        "7.3.1",
        "`PERMANENT_SESSION_LIFETIME`, `session.lifetime`; by the server's clock",
        ("test_g13_expiry::test_the_idle_lifetime_slides", "test_g13_expiry::test_a_session_in_no_use_ends"),
    ),
    Row(
        "Absolute Timeout",
        "7.3.2",
        "`SESSION_ABSOLUTE_LIFETIME`, off unless set; neither use nor rotation extends it",
        (
            "test_g13_expiry::test_the_absolute_lifetime_ends_a_session_in_use",
            "test_g13_expiry::test_the_absolute_lifetime_stands",
        ),
    ),
    Row(
        "Manual Session Expiration (log-out)",
        "7.4.1",
        "`session.clear()` or `destroy()` ends it on the server; nothing in flight brings it back",
        (
            "test_g7_dead_stays_dead::test_twenty_writers_cannot_undo_a_logout",
            "test_late_answers::test_a_log_out_over_a_rotation",
        ),
    ),
    Row(
        "Simultaneous Session Logons",
        "7.4.2, 7.4.3, 7.4.5, 7.5.2",
        "`session.principal`; `sessions_of()`, `revoke()`, `revoke_all(principal, keep=...)`",
        (
            "test_principals::test_where_somebody_is_logged_in",
            "test_principals::test_log_out_everywhere",
            "test_log_out_everywhere::test_log_out_everywhere_over_three_processes",
        ),
    ),
    Row(
        "Logging Sessions Life Cycle",
        "16.2.5",
        "signals and logs carry the handle, which is no credential; never the secret or its digest",
        (
            "test_no_secret_shown::test_no_secret_over_a_whole_life",
            "test_signals::test_no_secret_in_any_signal",
        ),
    ),
    Row(
        "Built-in Session Management Implementations (storage)",
        "",
        "Redis holds the secret's SHA-256 alone: who reads it has no cookie",
        ("test_stolen_store::test_nothing_that_is_stored_opens_a_session",),
    ),
    Row(
        "Session ID Content (or Value): encrypt what is sensitive",
        "14.2.4",
        "`SESSION_ENCRYPTION_KEYS`: values are sealed with AES-256-GCM, bound to session and key",
        (
            "test_encryption::test_no_value_is_stored_in_the_clear",
            "test_encryption::test_a_value_moved_to_another_session_reads_as_missing",
            "test_encryption::test_keys_are_changed_in_use",
        ),
    ),
    Row(
        "Used vs. Accepted Session ID Exchange Mechanisms",
        "14.2.1",
        "the id counts in its cookie only, never in a URL, a form or another header",
        ("test_stolen_store::test_an_id_counts_in_its_cookie_only",),
    ),
    Row(
        "HttpOnly, Secure, SameSite, Domain and Path Attributes",
        "3.3.1 to 3.3.4",
        "Flask's `SESSION_COOKIE_*`: HttpOnly is on; **Secure is off and SameSite is not sent unless you set them**",
        ("test_flask::test_cookie_attributes", "test_owasp::test_what_flask_leaves_to_you"),
    ),
    Row(
        "Expire and Max-Age Attributes",
        "",
        "a session cookie, unless `session.permanent`",
        ("test_flask::test_permanent_and_its_expiry",),
    ),
    Row(
        "Web Content Caching",
        "14.3.2",
        "`Vary: Cookie` whenever the session was used or a cookie is set; with the session id also"
        " `Cache-Control: private`, unless the app sends its own",
        ("test_flask::test_vary_and_accessed", "test_owasp::test_no_shared_cache_keeps_a_cookie"),
    ),
)


@cache
def names_in(name: str) -> frozenset[str]:
    tree = ast.parse((TESTS / f"{name}.py").read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def table() -> str:
    lines = ["| OWASP cheat sheet | ASVS 5.0 | luasession | shown by |", "|---|---|---|---|"]
    for row in ROWS:
        shown = ", ".join(
            f"`{name}`" for name in dict.fromkeys(test.partition("::")[0] for test in row.tests)
        )
        lines.append(f"| {row.sheet} | {row.asvs} | {row.where} | {shown} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.sheet)
def test_what_is_named_is_there(row: Row) -> None:
    """Each test that a row names exists, and each row names one."""
    assert row.tests
    for test in row.tests:
        file, _, name = test.partition("::")
        assert name in names_in(file), test


def test_the_table_in_the_readme() -> None:
    """The README's table is this one."""
    text = readme()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.partition(BEGIN)[2].partition(END)[0] == table()


def test_what_flask_leaves_to_you(make_valkey_app: MakeApp) -> None:
    """By default: HttpOnly and Vary, and neither Secure nor SameSite; with the settings, all cookies have them."""
    browser = make_valkey_app().browser()
    browser.run(lambda: session.update(a=1))
    assert browser.response is not None
    for line in browser.set_cookies.values():
        assert "; HttpOnly" in line
        assert "; Secure" not in line
        assert "SameSite" not in line
    assert browser.response.headers["Vary"] == "Cookie"
    safe = make_valkey_app(
        SESSION_COOKIE_SECURE=True, SESSION_COOKIE_SAMESITE="Lax", SESSION_COOKIE_NAME="__Host-session"
    ).browser()
    safe.run(lambda: session.update(a=1))
    assert set(safe.set_cookies) == {"__Host-session", "__Host-session_v"}
    for line in safe.set_cookies.values():
        assert "; Secure" in line
        assert "; HttpOnly" in line
        assert "; SameSite=Lax" in line
        assert "; Path=/" in line
        assert "Domain" not in line


def test_no_shared_cache_keeps_a_cookie(make_valkey_app: MakeApp) -> None:
    """An answer that names the session id or takes it away is private, unless the app says otherwise."""
    app = make_valkey_app()
    browser = app.browser()

    def sent() -> list[str]:
        assert browser.response is not None
        return browser.response.headers.getlist("Cache-Control")

    browser.run(lambda: session.get("a"))
    assert sent() == []
    browser.run(lambda: session.update(a=1))
    assert sent() == ["private"]
    browser.run(lambda: session.get("a"))
    assert sent() == []
    browser.run(lambda: session.update(a=2))  # a hint: whoever gets another one's asks Redis, and that is all
    assert set(browser.set_cookies) == {"session_v"}
    assert sent() == []

    def own() -> Any:
        session.regenerate()
        return app.flask.response_class("x", headers={"Cache-Control": "no-store"})

    browser.run(own)
    assert sent() == ["no-store"]
    browser.run(lambda: session.clear())
    assert sent() == ["private"]


if __name__ == "__main__":
    head, _, rest = readme().partition(BEGIN)
    PATH.write_text(head + BEGIN + table() + END + rest.partition(END)[2])
