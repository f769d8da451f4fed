"""Many runs: Optuna studies, their workers, trials, recovery after kills, search spaces, results."""
