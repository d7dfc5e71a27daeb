"""How many examples hypothesis draws: few in `make test`, all of them in `make soak`."""

from hypothesis import HealthCheck, settings

# Examples take as long as the machine needs, so none has a deadline of its own.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=30, derandomize=True, **COMMON)
settings.register_profile("full", max_examples=100, **COMMON)
settings.load_profile("quick")  # `--hypothesis-profile=full` replaces it
