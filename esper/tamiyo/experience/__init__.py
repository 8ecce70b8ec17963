"""What was decided and what came of it, written down for good and shared by runs."""

from esper.tamiyo.experience.records import DecisionFacts, Experience, OutcomeFacts
from esper.tamiyo.experience.store import ExperienceStore

__all__ = ["DecisionFacts", "Experience", "ExperienceStore", "OutcomeFacts"]
