"""TLS, live: one server, a cluster and a sentinel that speak nothing else, with certificates of a test's own."""

from __future__ import annotations

import datetime as dt
import os
import signal
import ssl
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from flask import session

from .conftest import TestApp
from .servers import LeashedProcess, binary_of, eventually, free_port, missing

# The server of Debian is built with TLS; those that come in Python packages are not.
KIND = "redis-7.0"

pytestmark = pytest.mark.skipif(
    missing(KIND) is not None and not os.environ.get("CI"), reason=f"{missing(KIND)}: it is the one with TLS"
)


def authority(folder: Path, name: str) -> dict[str, Path]:
    """Write a certificate authority, and what it vouches for: a server on 127.0.0.1; return the files."""

    def certificate(
        subject: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (subject, issuer)]
        return (
            x509.CertificateBuilder()
            .subject_name(names[0])
            .issuer_name(names[1])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=subject == issuer, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
            )
            .sign(issuer_key, hashes.SHA256())
        )

    root, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    files = {part: folder / f"{name}-{part}.pem" for part in ("ca", "cert", "key")}
    files["ca"].write_bytes(certificate(name, root, name, root).public_bytes(Encoding.PEM))
    files["cert"].write_bytes(certificate("server", server, name, root).public_bytes(Encoding.PEM))
    files["key"].write_bytes(
        server.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    )
    return files


class Servers:
    """A server, a cluster of one node and a sentinel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = authority(folder, "right")
        self.processes: list[LeashedProcess] = []
        self.server, self.node, self.sentinel = free_port(), free_port(), free_port()
        common = {
            "port": 0,
            "bind": "127.0.0.1",
            "tls-cert-file": self.files["cert"],
            "tls-key-file": self.files["key"],
            "tls-ca-cert-file": self.files["ca"],
            "tls-auth-clients": "no",
            "tls-replication": "yes",
            "dir": folder,
        }
        alone = {**common, "tls-port": self.server, "save": '""'}
        bus = free_port()
        self._start("server", alone)
        self._start(
            "node",
            {
                **common,
                "tls-port": self.node,
                "save": '""',
                "cluster-enabled": "yes",
                "tls-cluster": "yes",
                "cluster-port": bus,
                "cluster-config-file": "nodes.conf",
            },
        )
        self._wait_for(self.server)
        self._wait_for(self.node)
        with self.client(self.node) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            eventually(lambda: "cluster_state:ok" in str(client.execute_command("CLUSTER", "INFO")))
        watched = {**common, "tls-port": self.sentinel, "sentinel monitor main 127.0.0.1": f"{self.server} 1"}
        self._start("sentinel", watched, "--sentinel")
        self._wait_for(self.sentinel)

    def _wait_for(self, port: int) -> None:
        def answers() -> bool:
            with suppress(redis.ConnectionError), self.client(port) as client:
                return bool(client.ping())
            return False

        assert eventually(answers), "the server does not start"

    def _start(self, name: str, settings: dict[str, object], *flags: str) -> None:
        file = self.folder / f"{name}.conf"
        file.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        command = [binary_of(KIND), str(file), *flags]
        self.processes.append(LeashedProcess(command, self.folder / f"{name}.log"))

    def client(self, port: int) -> redis.Redis:
        """Return a client of one of them."""
        return redis.Redis(
            port=port, host="127.0.0.1", ssl=True, ssl_ca_certs=str(self.files["ca"]), ssl_check_hostname=True
        )

    def url(self, way: str, ca: Path) -> str:
        """Return the URL of one of them, for who trusts an authority."""
        options = f"?ssl_ca_certs={ca}"
        return {
            "server": f"rediss://127.0.0.1:{self.server}/0{options}",
            "cluster": f"rediss+cluster://127.0.0.1:{self.node}{options}",
            "sentinel": f"rediss+sentinel://127.0.0.1:{self.sentinel}/main/0{options}&sentinel_ssl_ca_certs={ca}",
        }[way]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    running = Servers(tmp_path_factory.mktemp("tls"))
    try:
        yield running
    finally:
        for process in running.processes:
            process.end(signal.SIGTERM)


@pytest.mark.parametrize("way", ["server", "cluster", "sentinel"])
def test_sessions_over_tls(servers: Servers, way: str) -> None:
    """A session lives its life over TLS, and the server's certificate is checked against the URL's authority."""
    app = TestApp(None, {"SESSION_REDIS_URL": servers.url(way, servers.files["ca"])})
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    browser.run(lambda: (session.regenerate(), session.update(b=len(session))))
    assert browser.twin(app.another()).run(lambda: dict(session)) == {"a": 1, "b": 1}
    browser.run(lambda: session.clear())
    assert browser.run(lambda: dict(session)) == {}


@pytest.mark.parametrize("way", ["server", "cluster", "sentinel"])
def test_a_certificate_of_nobody(servers: Servers, way: str, tmp_path: Path) -> None:
    """A server whose certificate another authority signed is not spoken to: 503, and nothing is stored."""
    wrong = authority(tmp_path, "wrong")["ca"]
    app = TestApp(None, {"SESSION_REDIS_URL": servers.url(way, wrong), "SESSION_REDIS_DEADLINE": 0.1})
    reasons: list[str] = []
    app.flask.register_error_handler(503, lambda error: (reasons.append(error.reason), ("down", 503))[1])
    app.browser().run(lambda: session.update(a=1), status=503)
    assert ssl.SSLCertVerificationError.__name__ in reasons[0] or "CERTIFICATE_VERIFY_FAILED" in reasons[0]
