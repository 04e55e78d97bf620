"""Time limits per example say more about a busy machine than about the plan language."""

from hypothesis import settings

settings.register_profile("plan", settings.default, deadline=None)
settings.load_profile("plan")
