"""What the tests share: memory layouts and guard bands, the float64 oracle, the process they run in."""
