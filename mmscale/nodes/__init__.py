"""The nodes of a run, looked at and measured by its own ranks before it starts: `python -m mmscale.nodes CONFIG [key=value ...]`."""
