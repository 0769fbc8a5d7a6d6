"""What a run leaves behind and what a person sees of it; also the metric types and their one table of keys.

    metrics      typed metrics, reduction, METRICS          run_logger  RunLogger: all sinks of a run behind one object
    timeline     spans and where the time of a step went     report      write_report: one HTML page from one or several runs

Import the module you need: `metrics` and `timeline` need only the standard library, the others rich, wandb or matplotlib."""
