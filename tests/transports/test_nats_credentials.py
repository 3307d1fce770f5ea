"""A credentials file of a server with operators and accounts, as hosted ones are: made here, by hand, as `nsc` does."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.transports.nats_nodes import Node, running
from tests.transports.nats_servers import NatsServer, needs_a_server
from tests.transports.nodes import all_meet

nkeys = pytest.importorskip("nkeys", reason="nkeys, which credentials need, is not installed")
pytestmark = [pytest.mark.real_time, needs_a_server]

ANY = {"subs": -1, "data": -1, "payload": -1}


class Party:
    """An operator, an account or a user."""

    def __init__(self, prefix: int) -> None:
        self.seed = nkeys.encode_seed(os.urandom(32), prefix)
        self.keys = nkeys.from_seed(bytearray(self.seed))
        self.id = self.keys.public_key.decode()

    def vouches(self, other: "Party", kind: str, **claims: Any) -> str:
        """Return the token in which it says who the other one is."""
        says = {"jti": other.id, "iat": 1, "iss": self.id, "name": kind, "sub": other.id}
        body = {**says, "nats": {**claims, "type": kind, "version": 2}}
        head = {"typ": "JWT", "alg": "ed25519-nkey"}
        signed = ".".join(_base64(json.dumps(part).encode()) for part in (head, body))
        return f"{signed}.{_base64(self.keys.sign(signed.encode()))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


async def test_who_has_a_credentials_file_gets_in_also_when_the_server_is_back(tmp_path: Path) -> None:
    prefixes = (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_USER)
    operator, account, user = (Party(prefix) for prefix in prefixes)
    limits = {**ANY, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
    accounts = f"{account.id}: {operator.vouches(account, 'account', limits=limits)}"
    config = f"operator: {operator.vouches(operator, 'operator')}\nresolver: MEMORY\nresolver_preload: {{ {accounts} }}"
    file = tmp_path / "user.creds"
    token = account.vouches(user, "user", pub={}, sub={}, **ANY)
    file.write_text(
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )
    (tmp_path / "other").write_text("no credentials")
    with NatsServer(config) as server:
        alice, bob = (Node(name, server.url, credentials=str(file)) for name in ("alice", "bob"))
        async with running(alice, bob):
            server.kill()
            await alice.loses(bob)
            server.start()
            await all_meet(alice, bob)
        with pytest.raises(PermissionError, match="does not accept the user, password, token or credentials"):
            await Node("alice", server.url).start()
        for path in ("missing", "other"):
            with pytest.raises(PermissionError, match=f"the credentials file .*{path} cannot be used: "):
                await Node("alice", server.url, credentials=str(tmp_path / path)).start()
