"""Many runs: tuned, run, compared and reported."""
