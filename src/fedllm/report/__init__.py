"""Tables, plots and the page, drawn from a run's files; nothing here runs anything again."""
