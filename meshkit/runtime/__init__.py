"""The runtime: message routing, request and reply, and the life of services."""
