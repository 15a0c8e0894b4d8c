"""An HTML report on training runs: settings, data, metrics and notable findings."""
