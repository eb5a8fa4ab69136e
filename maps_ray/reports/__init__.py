"""What runs and sweeps recorded, as tables, plots and pages of HTML."""
