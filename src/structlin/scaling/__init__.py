"""Scaling laws of training runs: loss against FLOPs, pooled over sizes, fitted, and compared with dense. The records of
`structlin compare` and `structlin train` are what it reads; docs/scaling.md says how."""
