"""The parts of the transport over TCP: records, handshake, link (one connection), listen, dial."""
