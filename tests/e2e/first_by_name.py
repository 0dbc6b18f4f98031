"""The first engine by name of those that take work does it all, however busy it is."""


async def policy(request, fleet):
    engine = min(fleet.engines, key=lambda each: each.info.name)
    yield engine.start_generate(request)
