"""Beside a locustfile: the run ends when so many requests have been answered, however long that takes."""

from __future__ import annotations

import gevent
from locust import events

ENOUGH = 16  # each chat counts twice: when its first piece comes, and when it ends


@events.init.add_listener
def watch(environment, **_):
    def count(**_):
        if environment.stats.num_requests == ENOUGH:
            gevent.spawn(environment.runner.quit)  # which waits for those who are still asking

    environment.events.request.add_listener(count)
