"""One connection to a NATS server. The only importer of nats-py, of which a `Link` is a client that never reconnects.

Used of it: the connection, TLS, credentials and the parser. Replaced is what it does when a message comes (a queue and
a task for each subscription: order between them is lost), when a server tells of its cluster, when the connection
breaks (it keeps what was not sent and sends it later, when its callers have given up; it waits for a server that reads
nothing) and how it finds that out (pings that wait behind what is unsent).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# nats-py is typed in part only, and JSON is not.

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import anyio
import nats.errors
from nats.aio.client import PING_PROTO, PONG_PROTO, Client
from nats.aio.transport import TcpTransport

from meshkit.transports._nats.servers import Server

__all__ = ["Link", "Unfit", "connect"]

_log = logging.getLogger("meshkit.transports.nats")
_NO_RESPONDERS = b"NATS/1.0 503"


class Unfit(ConnectionError):
    """The server cannot be used as it is configured: that does not heal by itself."""


class _Socket(TcpTransport):
    """The socket. It tells of each sign of life, and of its end; when it is aborted, nobody waits for it."""

    def __init__(self, *, tls: bool, on_end: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heard = False  # since this was set to False
        self._tls = tls
        self._on_end = on_end

    def __bool__(self) -> bool:
        return True  # or the client would make one of its own

    async def read(self, buffer_size: int) -> bytes:
        """Return what has come."""
        try:
            data: bytes = await super().read(buffer_size)
        except OSError as error:
            self._on_end(str(error))
            raise
        if data:
            self.heard = True
        else:
            self._on_end("it has closed the connection")
        return data

    def write(self, payload: bytes) -> None:
        """Send; `Unfit` if that would show what is secret."""
        writer = self._io_writer
        assert writer is not None, "it was not connected"  # noqa: S101 - the client connects first
        if self._tls and writer.get_extra_info("ssl_object") is None:
            raise Unfit("it does not offer TLS")
        if not writer.is_closing():  # else asyncio would log that, until it is noticed
            writer.write(payload)

    @property
    def unsent(self) -> int:
        """Bytes that wait here."""
        return self._io_writer.transport.get_write_buffer_size() if self._io_writer else 0

    def abort(self) -> None:
        """Close now, whatever is unsent."""
        for writer in (self._io_writer, self._bare_io_writer):
            if writer is not None:
                writer.transport.abort()


class Link(Client):
    """A connection. `ended` is done, with the reason, when it is of no more use.

    `receive(subject, data)` takes each message, `unanswered(subject)` is called when the server says of a message that
    it has no subscriber for it: the subject is the reply subject of that message.
    """

    def __init__(
        self, server: Server, receive: Callable[[bytes, bytes], None], unanswered: Callable[[bytes], None]
    ) -> None:
        super().__init__()
        self.server = server
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.cluster: list[Server] = []
        """The other servers of which it has told. One that knows no other any more is cut off from them."""
        self.denied = ""  # the first thing that the server does not permit
        self._checked = False
        self._receive = receive
        self._unanswered = unanswered
        self._transport = self._socket = _Socket(tls=server.tls, on_end=self.end)
        self._answers: deque[asyncio.Future[None] | None] = deque()  # to the pings under way

    # --- for the transport

    @property
    def unsent(self) -> int:
        """Bytes that wait to be sent."""
        return self._socket.unsent

    def publish_now(self, subject: bytes, data: bytes, reply: bytes = b"") -> None:
        """Publish, without waiting; whoever calls this looks at `unsent` first."""
        if not self.ended.done():
            self._socket.write(b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(data), data))

    def subscribe_now(self, subject: bytes, number: int) -> None:
        """Subscribe. The client's own way would let pings overtake it, and `taken_in` return too soon."""
        self._socket.write(b"SUB %b %d\r\n" % (subject, number))

    def ping(self) -> None:
        """Ask the server for a sign of life."""
        self._ping(None)

    def was_heard(self) -> bool:
        """Return whether there was a sign of life since the last time that this was asked."""
        heard, self._socket.heard = self._socket.heard, False
        return heard

    async def taken_in(self) -> None:
        """Return when the server has taken in all that was sent, or the link has ended."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ping(answer)
        both: list[asyncio.Future[Any]] = [answer, self.ended]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)

    def _ping(self, answer: "asyncio.Future[None] | None") -> None:
        if not self.ended.done():
            self._answers.append(answer)
            self._socket.write(PING_PROTO)

    def check(self, max_frame: int) -> None:
        """Raise what speaks against using this connection."""
        self._checked = True
        if self._reading_task is not None:
            self._reading_task.add_done_callback(self._on_reader_end)
        if self.ended.done():
            raise ConnectionError(self.ended.result())
        if self.denied:
            raise PermissionError(self.denied)
        if self.max_payload < max_frame:
            raise Unfit(
                f"it takes messages of at most {self.max_payload} bytes, and a frame may have {max_frame}: raise "
                "max_payload in its configuration, or lower NatsLimits(max_frame=...)"
            )

    def end(self, reason: str) -> None:
        """Use it no more."""
        if not self.ended.done():
            self.ended.set_result(reason)

    async def abort(self) -> None:
        """End now; nothing is left behind."""
        self.end("it was closed")
        self._socket.abort()
        tasks: list[asyncio.Task[Any]] = [
            task for task in (self._reading_task, self._ping_interval_task, self._flusher_task) if task
        ]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- what the client does otherwise

    async def _select_next_server(self) -> None:
        self._current_server = self._server_pool[0]
        await self._connect_to_server(self._current_server)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        self.cluster = self._others(info.get("connect_urls")) or self.cluster
        if self.server.tls and info.get("tls_available"):
            info["tls_required"] = True  # by this end: the client would talk in plain text where the server lets it

    def _others(self, urls: object) -> list[Server]:
        others: list[Server] = []
        for url in urls if isinstance(urls, list) else ():
            with suppress(ValueError):  # it can tell anything
                told = Server.parse(url)
                others.append(self.server.other(told.host, told.port))
        return [other for other in others if str(other) != str(self.server)]

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        if headers is None:
            self._receive(bytes(subject), data)
        elif headers.startswith(_NO_RESPONDERS):
            self._unanswered(bytes(subject))

    async def _process_ping(self) -> None:
        self._socket.write(PONG_PROTO)  # the client never answers, if it is asked while it connects

    async def _process_pong(self) -> None:
        answer = self._answers.popleft() if self._answers else None
        if answer is not None and not answer.done():
            answer.set_result(None)

    def _on_reader_end(self, _: object) -> None:
        self.end("it sent what is not understood")  # unless there is another reason already

    async def _process_err(self, err_msg: str) -> None:
        text = err_msg.strip("' ")
        if "permissions violation" not in text or (self._checked and "for subscription" in text):  # it hears nothing
            self.end(f"it said: {text}")
        elif not self.denied:
            self.denied = text
            if self._checked:
                _log.warning("the NATS server %s does not permit what the mesh needs: %s", self.server, text)

    async def _process_op_err(self, e: Exception) -> None:
        self.end(str(e))


async def connect(
    server: Server,
    subjects: Iterable[bytes],
    *,
    name: str,
    max_frame: int,
    timeout: float,
    tls: ssl.SSLContext | None,
    credentials: str | None,
    receive: Callable[[bytes, bytes], None],
    unanswered: Callable[[bytes], None],
) -> Link:
    """Connect to a server, and return when it has taken in the subscriptions to `subjects`.

    Raises:
        PermissionError: It does not let this node in, or does not permit a subscription.
        ConnectionError: It cannot be used; the message says why. It is `Unfit` if only people can change that.
    """
    link = Link(server, receive, unanswered)
    options: dict[str, Any] = {"user": server.user, "password": server.password, "token": server.token}
    try:
        with anyio.fail_after(timeout):
            await link.connect(
                [server.url],
                name=name,
                error_cb=_ignore,
                allow_reconnect=False,
                no_echo=True,
                connect_timeout=timeout,  # type: ignore[arg-type]  # any number will do
                ping_interval=10**9,  # in the client's way; the transport does it
                tls=tls,
                tls_hostname=server.certified or server.host,
                user_credentials=credentials,
                **{key: value for key, value in options.items() if value is not None},
            )
            for number, subject in enumerate(subjects, 1):
                link.subscribe_now(subject, number)
            await link.taken_in()
            link.check(max_frame)
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            await link.abort()
        if isinstance(error, Exception):
            raise _explained(error, server, timeout, credentials) from error
        raise
    return link


async def _ignore(error: Exception) -> None:
    """Do nothing: whatever ends a connection is told by `ended`."""


def _explained(error: Exception, server: Server, timeout: float, credentials: str | None) -> OSError:
    """Return the error that says what is wrong, and what to do."""
    text = str(error)
    where = f"NATS server {server}: "
    if isinstance(error, TimeoutError):
        return ConnectionError(f"{where}no answer within {timeout:g} s")
    if isinstance(error, ConnectionRefusedError):
        return ConnectionError(f"{where}nobody listens there")
    if isinstance(error, ssl.SSLCertVerificationError):
        why = f"its certificate is not accepted ({error.verify_message}): give an ssl.SSLContext that knows its CA"
        return Unfit(f"{where}{why}, as tls=")
    if isinstance(error, Unfit):
        return Unfit(f"{where}{text}")
    if "INFO message" in text:
        return ConnectionError(f"{where}whoever listens there is no NATS server")
    if isinstance(error, PermissionError) or "permissions violation" in text.lower():
        return PermissionError(f"{where}it does not permit what the mesh needs: {text}")
    if "authorization" in text.lower() or "authentication" in text.lower():
        return PermissionError(f"{where}it does not accept the user, password, token or credentials that were given")
    if credentials is not None and not isinstance(error, nats.errors.Error | ConnectionError):
        return PermissionError(f"{where}the credentials file {credentials} cannot be used: {text}")
    return ConnectionError(f"{where}{text or type(error).__name__}")
