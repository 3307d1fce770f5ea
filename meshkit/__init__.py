"""meshkit: cancellation-exact service utilities for asyncio, and a small runtime they plug into."""
