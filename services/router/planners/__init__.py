"""Planners, each one async program in a file of its own; docs/policies.md teaches how to write one."""

from services.router.planning.fleet import PlannerFleet
from services.router.planning.topics import Topic
from services.router.planning.view import Move, Site, View

__all__ = ["Move", "PlannerFleet", "Site", "Topic", "View"]
