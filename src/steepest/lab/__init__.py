"""What the command line runs, built on the library: data, models, training, studies, reports."""
