"""A scan of the live ports, as a stranger would make it: nothing but TLS 1.3 with its own ciphers.

docs/coordinator.md says what sslyze finds; it needs an older cryptography than ours.
"""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from coordinator_help import Fleet, Served

CIPHERS = {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"}
OPENSSL = shutil.which("openssl")

pytestmark = pytest.mark.skipif(OPENSSL is None, reason="there is no openssl command here")


@pytest.fixture
def scanned(fleet: Fleet) -> Served:
    return fleet.serve(fleet.bundle())


def s_client(address: str, *options: str) -> str:
    """What a handshake came to."""
    done = subprocess.run(
        [str(OPENSSL), "s_client", "-connect", address, *options],
        input="",
        capture_output=True,
        text=True,
        errors="replace",
        timeout=30,
        check=False,
    )
    return done.stdout


@pytest.mark.parametrize("port", ["address", "enrolment"])
def test_a_scan_of_the_port_finds_nothing(scanned: Served, port: str, tmp_path: Path) -> None:
    address = scanned.listening[port]
    weakest = ("-cipher", "ALL:@SECLEVEL=0")
    for version in ("-tls1", "-tls1_1", "-tls1_2"):
        assert "Cipher is (NONE)" in s_client(address, version, *weakest), version
    known = {cipher["name"] for cipher in ssl.create_default_context().get_ciphers()}
    candidates = {name for name in known if name.startswith("TLS_")} | {
        "TLS_AES_128_CCM_SHA256",
        "TLS_AES_128_CCM_8_SHA256",
    }
    assert candidates > CIPHERS
    taken = {
        name
        for name in candidates
        if f"Cipher is {name}" in s_client(address, "-tls1_3", "-ciphersuites", name)
    }
    assert taken == CIPHERS

    found = s_client(address, "-tls1_3", "-alpn", "h2", "-comp", "-showcerts")
    assert "ALPN protocol: h2" in found
    assert "Compression: NONE" in found
    assert "Early data was not sent" in found
    assert "Max Early Data: 0" in found or "Max Early Data" not in found
    assert "Peer signature type: ECDSA" in found
    assert "Server public key is 256 bit" in found
    # Plain HTTP, and HTTP/1.1 over TLS, are not spoken.
    assert "ALPN protocol: http/1.1" not in s_client(address, "-tls1_3", "-alpn", "http/1.1")
