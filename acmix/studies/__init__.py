"""Studies: arms × seeds of one config. What to run, what is done, the statistics over seeds, table and plot."""
