"""Console, logs, metrics, trackers and the HTML report."""
