"""Where tokens stand on the rotary axes, and how stored keys move along them."""

from millpond.positions.rotary import Clock, Rope

__all__ = ["Clock", "Rope"]
