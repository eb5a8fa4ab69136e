"""Action error offline, simulators, reports."""
