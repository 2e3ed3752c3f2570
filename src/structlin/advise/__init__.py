"""Which structure pays where: a device's ceilings from its benchmarks, layers and whole models predicted from these,
and structures and sizes allocated to the layers of a model under a budget. docs/advise.md shows how."""
