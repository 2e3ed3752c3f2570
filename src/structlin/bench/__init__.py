"""The ruler: shapes x structures x backends, checked against float64, then timed against dense in one run."""
