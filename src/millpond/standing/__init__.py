"""Standing questions: asked again and again on stream time; `millpond.Session.every` sets one up."""

from millpond.standing.event import Counts, StandingEvent
from millpond.standing.question import OnAnswer, StandingQuestion

__all__ = ["Counts", "OnAnswer", "StandingEvent", "StandingQuestion"]
