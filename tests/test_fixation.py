"""Session fixation: who knew the id before a log-in has nothing of the session after it.

The attacker planted the cookie in the victim's browser, or read it there. OWASP Session Management Cheat
Sheet, "Renew the Session ID After Any Privilege Level Change"; ASVS 5.0, 7.2.4.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from flask import session

from luasession import SessionGone

from .conftest import Browser, MakeApp, TestApp
from .mutations import mutated

SECRET = "what only the victim may see"


def look() -> Any:
    return dict(session), session.principal, session.label, session.permanent


def look_twice() -> Any:
    first = look()
    session.reload()
    return first, look()


def write() -> None:
    session["planted"] = 1


def write_on() -> Any:
    seen = look()
    session["planted"] = 1
    session["cart"] = ["poisoned"]
    return seen


def delete() -> None:
    session.pop("user", None)
    session.pop("cart", None)


def clear_and_set() -> None:
    session.clear()
    session["planted"] = 1


def commit_midway() -> Any:
    session["planted"] = 1
    with suppress(SessionGone):
        session.commit()
    session["planted again"] = 1
    return look()


def update() -> Any:
    with suppress(SessionGone):
        return session.atomic_update("cart", lambda cart: [*(cart or []), "poisoned"], [])


def take_over() -> Any:
    session.principal, session.label, session.permanent, session.lifetime = "mallory", "mine", True, 10**6
    return session.principal


def log_in_too() -> Any:
    seen = look()
    session["planted"] = 1
    session.principal = "mallory"
    session.regenerate()
    return seen


def rotate_too() -> Any:
    session.regenerate()
    return look()


ATTACKS = [
    look, look_twice, write, write_on, delete, clear_and_set, commit_midway, update, take_over, log_in_too, rotate_too,
]  # fmt: skip
#: Those that ask for a session of their own, and get one (G8): never the victim's.
OWN = (log_in_too, rotate_too)


def log_in() -> None:
    session["user"] = SECRET
    session.principal = SECRET
    session.label = SECRET
    session.regenerate()


def step_up() -> None:
    session["user"] = SECRET
    session.label = SECRET
    session.regenerate(in_flight=False)


RENEWALS = [log_in, step_up]


@dataclass
class Scene:
    """A victim with an anonymous session, and an attacker with the same cookie."""

    app: TestApp
    victim: Browser
    attacker: Browser
    planted: str

    def attack(self, attack: Callable[[], Any]) -> None:
        """Run it, and check what the attacker sees and is given."""
        check(self, self.attacker, self.attacker.run(attack), attack)


def check(scene: Scene, attacker: Browser, seen: Any, attack: Callable[[], Any]) -> None:
    assert SECRET not in repr(seen)
    given = attacker.set_cookies.get("session")
    if attack not in OWN:
        assert given is None, "a cookie was set or deleted"
    if given is not None:
        assert scene.planted.partition(".")[0] not in given, "an id of the victim's session"


def unharmed(scene: Scene) -> None:
    """The victim has his session and all that he put into it, and nothing else is in there."""
    for app in (scene.app, scene.app.another()):
        seen = scene.victim.twin(app).run(look)
        assert seen[0] == {"cart": [1], "user": SECRET}
        assert seen[1] in (SECRET, None)
        assert seen[2:] == (SECRET, False)


@pytest.fixture(params=["planted", "read"])
def scene(request: pytest.FixtureRequest, make_valkey_app: MakeApp) -> Scene:
    """The cookie is one that the attacker got for himself and planted, or one that he read."""
    app = make_valkey_app()
    first, second = app.browser(), app.browser()
    first.run(lambda: session.update(cart=[1]))
    planted = first.cookies["session"]
    second.client.set_cookie("session", planted)
    victim, attacker = (second, first) if request.param == "planted" else (first, second)
    return Scene(app, victim, attacker, planted)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("renewal", RENEWALS)
def test_log_in_then_attack(scene: Scene, renewal: Callable[[], None], attack: Callable[[], Any]) -> None:
    """Victim logs in | attacker comes with the old id, in the grace, once and once more."""
    scene.victim.run(renewal)
    scene.attack(attack)
    if attack not in OWN:
        scene.attack(attack)
    unharmed(scene)


@pytest.mark.parametrize("attack", ATTACKS)
def test_warm_elsewhere_then_log_in_then_attack(scene: Scene, attack: Callable[[], Any]) -> None:
    """Another process caches the session | victim logs in | attacker asks that process: it shows nothing later."""
    elsewhere = scene.attacker.twin(scene.app.another(SESSION_CACHE_TTL=60.0))
    assert elsewhere.run(lambda: dict(session)) == {"cart": [1]}
    scene.victim.run(log_in)
    check(scene, elsewhere, elsewhere.run(attack), attack)
    unharmed(scene)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("renewal", RENEWALS)
@pytest.mark.parametrize("reads", [True, False], ids=["reads first", "blind"])
def test_attack_opens_then_log_in_then_attack_goes_on(
    scene: Scene, renewal: Callable[[], None], attack: Callable[[], Any], reads: bool
) -> None:
    """Attacker's request opens | victim logs in | that request goes on: it is dropped, principal or in_flight=False."""

    def view() -> Any:
        if reads:
            assert session["cart"] == [1]
        time.sleep(0.03)  # ages are exact to a call's transit; this is well over it
        scene.victim.run(renewal)
        return attack()

    check(scene, scene.attacker, scene.attacker.run(view), attack)
    unharmed(scene)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_opens_then_log_in_and_step_up_then_attack_goes_on(
    scene: Scene, attack: Callable[[], Any]
) -> None:
    """Attacker's request opens | victim logs in | victim rotates again, letting requests go on | it goes on."""

    def view() -> Any:
        assert session["cart"] == [1]
        time.sleep(0.03)  # ages are exact to a call's transit; this is well over it
        scene.victim.run(log_in)
        scene.victim.run(lambda: session.regenerate())
        return attack()

    check(scene, scene.attacker, scene.attacker.run(view), attack)
    unharmed(scene)


@pytest.mark.parametrize("attack", [look_twice, write, write_on, commit_midway, take_over])
def test_rotation_then_log_in_with_attacks_open_at_each(scene: Scene, attack: Callable[[], Any]) -> None:
    """A rotation lets the attacker's open request go on | the log-in after it ends that, too."""

    def view() -> Any:
        assert session["cart"] == [1]
        time.sleep(0.03)  # ages are exact to a call's transit; this is well over it
        scene.victim.run(lambda: session.regenerate())
        scene.victim.run(log_in)
        return attack()

    check(scene, scene.attacker, scene.attacker.run(view), attack)
    unharmed(scene)


@pytest.mark.parametrize("attack", [look, write_on, take_over])
def test_log_in_then_log_out_then_attack(scene: Scene, attack: Callable[[], Any]) -> None:
    """Victim logs in | victim logs out | attacker comes with the old id: nothing of the session is there."""
    scene.victim.run(log_in)
    scene.victim.run(lambda: session.destroy())
    seen = scene.attacker.run(attack)
    assert SECRET not in repr(seen)
    assert set(scene.app.stored(scene.planted.partition(".")[0])) == {b"@t"}


@pytest.mark.parametrize("how", [lambda: session.destroy(), lambda: session.clear()])
def test_log_in_then_log_out_by_the_attacker(scene: Scene, how: Callable[[], None]) -> None:
    """Victim logs in | attacker destroys, or clears, under the old id: honoured within the grace (G8), and no more.

    It is what makes a log-out that overlaps a rotation log out. The attacker can end, and not read or change.
    """
    scene.victim.run(log_in)
    scene.attacker.run(how)
    assert scene.victim.run(lambda: dict(session)) == {}
    assert set(scene.app.stored(scene.planted.partition(".")[0])) == {b"@t"}


@pytest.mark.parametrize("attack", [*ATTACKS, lambda: session.destroy(), lambda: session.clear()])
def test_log_in_then_grace_passes_then_attack(make_app: MakeApp, attack: Callable[[], Any]) -> None:
    """Victim logs in | the grace passes | the old id is no id: it ends nothing either."""
    app = make_app(SESSION_ROTATION_GRACE=0.03)
    victim = app.browser()
    victim.run(lambda: session.update(cart=[1]))
    planted = victim.cookies["session"]
    scene = Scene(app, victim, victim.twin(), planted)
    victim.run(log_in)
    time.sleep(0.06)
    seen = scene.attacker.run(attack)
    assert SECRET not in repr(seen)
    assert planted.partition(".")[0] not in scene.attacker.set_cookies.get("session", "")
    unharmed(scene)


def test_a_second_click_has_what_it_had_read(scene: Scene) -> None:
    """Attacker's request opens and reads | victim steps up, in_flight=False | it rotates: it keeps what it had read.

    The price of G8's second click: whoever held a log-in's old id at a step-up, with a request open that
    itself rotates, goes on with a copy of what he could read before. Log out everywhere ends that, too.
    """
    scene.victim.run(lambda: session.update(before="x"))
    scene.victim.run(lambda: setattr(session, "principal", "ada"))

    def view() -> Any:
        assert session["before"] == "x"
        time.sleep(0.03)  # ages are exact to a call's transit; this is well over it
        scene.victim.run(step_up)
        session.regenerate()

    scene.attacker.run(view)
    seen = scene.attacker.run(look)
    assert seen[0] == {"cart": [1], "before": "x"}
    assert SECRET not in repr(seen)
    assert scene.app.flask.extensions["luasession"].revoke_all("ada") == 2
    assert scene.attacker.twin(scene.app.another()).run(lambda: dict(session)) == {}


@pytest.mark.parametrize(
    ("guard", "attack"),
    [
        ("digest", write),
        ("a rotation that drops what is open", write),
        ("former digest met by a load", look_twice),
    ],
)
def test_a_guard_taken_out_is_found(make_valkey_app: MakeApp, guard: str, attack: Callable[[], Any]) -> None:
    """Without the guards of the scripts these tests fail."""
    app = make_valkey_app(SESSION_CACHE_TTL=None)
    victim = app.browser()
    with mutated(guard):
        victim.run(lambda: session.update(cart=[1]))
        scene = Scene(app, victim, victim.twin(), victim.cookies["session"])
        with pytest.raises(AssertionError):
            test_attack_opens_then_log_in_then_attack_goes_on(scene, log_in, attack, False)
