"""Keys and values in few bits: how they are written, and what that costs. Knows nothing about caches or policies."""
