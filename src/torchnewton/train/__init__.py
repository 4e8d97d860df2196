"""What a run on the command line needs: data, models, methods, loop, run folder and comparison."""
