"""What the example tasks share: fetching packages, reading archives, networks, a linear probe."""
