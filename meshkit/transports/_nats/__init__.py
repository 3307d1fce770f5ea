"""The parts of the transport over NATS: servers, announcements, company (who is up), link (one connection), mesh."""
